"""A process that loads published files with the real MindIE-SD and computes with every layer it replaced.

Usage: runtime_worker.py PACKAGES REQUEST.json RESULTS_FOLDER, alone or under torchrun. PACKAGES: the folder of
`mindie.fetch`. Rank r writes `answers_<r>.json`: for each case of the request (`cases.Case`) an answer.
"""

from __future__ import annotations

import contextvars
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.runtime.importing import import_quantization
from launcher.runtime.npu_operators import install

# Before the rest of the product: libraries that it imports look for torch_npu too, and are to find this one.
install()
RUNTIME = import_quantization(Path(sys.argv[1]))

from launcher.runtime.agreement import Agreement, agreements, replaced  # noqa: E402
from tests.runtime.cases import Answer, Case  # noqa: E402
from tests.runtime.product import (  # noqa: E402
    Checkpoint,
    deployed_model,
    files_in,
    float_model,
    float_part,
    open_checkpoint,
    output,
)


def answer(case: Case) -> Answer:
    """Load the case's files into a fresh float model and compare every layer that was replaced."""
    dtype = getattr(torch, case.dtype)
    model = float_part(case.kind, Path(case.pipeline), dtype) if case.pipeline else float_model(case.kind, dtype)
    policy = registered(case.registration)
    RUNTIME.quantize(model, case.description, dtype=dtype, timestep_config=policy, use_nz=case.use_nz)
    modules = replaced(model)
    published = {kind: open_published(Path(folder), kind) for kind, folder in case.published.items()}
    return Answer(
        classes={name: type(module).__name__ for name, module in modules.items()},
        layers=compared(case, published, modules),
        biases=[name for name, module in modules.items() if module.bias is not None],
        strategies=strategies(policy, published),
        output_error=output_error(model, case, published),
    )


def registered(line: str | None) -> Any:
    """Return a policy on which the published line was executed, as a user would paste it."""
    policy = RUNTIME.TimestepPolicyConfig()
    if line is not None:
        exec(line, {"policy": policy})
    return policy


def open_published(folder: Path, quant_type: str) -> Checkpoint:
    """Open this rank's checkpoint as the product reads it."""
    return open_checkpoint(files_in(folder, quant_type, dist.get_rank() if dist.is_initialized() else None))


def compared(
    case: Case, published: Mapping[str, Checkpoint], modules: Mapping[str, nn.Module]
) -> dict[str, list[Agreement]]:
    """Return the agreement of each replaced layer with what the product says of layers of its type."""
    dtype, found = getattr(torch, case.dtype), {}
    description = json.loads(own_rank(case.description).read_text())
    for name, module in modules.items():
        # The loader looks for the smoothed name first.
        quant_type = description.get(f"{name}.linear.weight", description.get(f"{name}.weight"))
        # A checkpoint of all types is named once, under the type that it is called after.
        source = published[quant_type] if quant_type in published else next(iter(published.values()))
        found[name] = list(agreements(RUNTIME, source, name, module, dtype))
    return found


def own_rank(description: str) -> Path:
    """Return the description that the loader reads on this rank."""
    path = Path(description)
    return path.with_name(path.name.replace("_0.json", f"_{dist.get_rank()}.json")) if dist.is_initialized() else path


def strategies(policy: Any, published: Mapping[str, Checkpoint]) -> list[str]:
    """Return what the runtime does in each step of a timestep scheme."""
    timesteps = next((c.inventory.timesteps for c in published.values() if c.inventory.timesteps), 0)
    return [policy.get_strategy(step, target="w8a8_static_linear") for step in range(timesteps)]


def output_error(model: nn.Module, case: Case, published: Mapping[str, Checkpoint]) -> float | None:
    """Return how far the whole model's output is from what the product says, relative, in the worst step.

    None where the product's checkpoint is not one of this whole model in this dtype.
    """
    dtype = getattr(torch, case.dtype)
    if case.pipeline or len(published) > 1 or any(c.inventory.dtype != dtype for c in published.values()):
        return None
    (checkpoint,) = published.values()
    deployed, errors = deployed_model(case.kind, checkpoint.files, dtype), []
    for step in range(checkpoint.inventory.timesteps or 1):
        RUNTIME.TimestepManager.set_timestep_idx(step)
        found, expected = (output(m, case.kind, dtype, step).to(torch.float64) for m in (model, deployed))
        errors.append(float((found - expected).norm() / expected.norm()))
    return max(errors)


def guarded(case: Case) -> Answer:
    """Answer a case; whatever is raised is an answer too."""
    try:
        return answer(case)
    except Exception as error:
        traceback.print_exc()
        return Answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Answer every case of the request, each with a step index of its own."""
    torch.set_num_threads(1)
    request, folder = Path(sys.argv[2]), Path(sys.argv[3])
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    cases = {name: Case(**case) for name, case in json.loads(request.read_text()).items()}
    answers = {name: asdict(contextvars.Context().run(guarded, case)) for name, case in cases.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"answers_{rank}.json").write_text(json.dumps(answers))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
