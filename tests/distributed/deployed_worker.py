"""One rank of the proof for deployed shards: quantizes its part, computes with it, and computes again from its files.

Usage: torchrun ... deployed_worker.py RESULTS_FOLDER. Rank r writes <kind>_<layout>_<scheme>_<r>.safetensors there:
the outputs of the model that was quantized and of a fresh one that loaded the files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import assert_collectives, make_local
from quant_core import SaveProcessorConfig, SessionConfig, TimestepManager, quant_model
from quant_core.checkpoint.loading import load_deployed
from quant_core.parallel.groups import Parallel
from quant_core.schemes import SCHEMES
from tests.support.tiny_models import KINDS, build, example_inputs

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron")]
STEPS = 2  # the first runs dynamic, the second static


def session(kind: str, scheme: str, folder: Path) -> SessionConfig:
    """Ask for a scheme on one record a step."""
    base = example_inputs(kind)
    records = [
        {"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + step)}, "timestep_idx": step}
        for step in range(STEPS)
    ]
    processors = {scheme: SCHEMES[scheme].config(), "save": SaveProcessorConfig(output_path=str(folder))}
    return SessionConfig(processor_cfg_map=processors, calib_data=records)


@torch.no_grad()
def output(model: Any, kind: str, step: int) -> Tensor:
    """Return the model's output on the example in a denoising step."""
    TimestepManager.set_timestep_idx(step)
    found = model(**example_inputs(kind))[0]
    TimestepManager.set_timestep_idx(None)
    return found


def outputs(kind: str, layout: str, scheme: str, folder: Path) -> dict[str, Tensor]:
    """Quantize this rank's part, and return what it and its files compute in each step."""
    plan, group = load_adapter(KINDS[kind][0]).shard_plan(layout), dist.group.WORLD
    models = {name: build(kind) for name in ("quantized", "loaded")}
    place = {"tp_rank": dist.get_rank(), "tp_size": dist.get_world_size(), "tp_group": group}
    shards = {name: make_local(model, plan, **place) for name, model in models.items()}["quantized"]
    result = quant_model(
        models["quantized"], session(kind, scheme, folder), parallel=Parallel(shards=shards, tp_group=group)
    )
    assert result.files is not None
    load_deployed(models["loaded"], result.files)
    for model in models.values():
        assert_collectives(model)
    return {f"{name}_{step}": output(model, kind, step) for name, model in models.items() for step in range(STEPS)}


def main() -> None:
    """Join the gloo group, run every case and write its outputs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), Path(sys.argv[1])
    for kind, layout in LAYOUTS:
        for scheme in SCHEMES:
            found = outputs(kind, layout, scheme, results / f"session_{rank}")
            save_file(found, results / f"{kind}_{layout}_{scheme}_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
