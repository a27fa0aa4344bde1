"""A process that loads a checkpoint with the real MindIE-SD and computes with every layer that it replaced.

    python -m launcher.runtime.worker PACKAGES FOLDER SCHEME SUFFIX...

PACKAGES holds the package `mindiesd`. For each rank, by the suffix of its files, it loads them as that rank of as many
as there are, compares each replaced layer with the arithmetic that the quantizer had in mind, and prints a JSON answer.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.runtime.importing import import_quantization, use_operators

OPERATORS = use_operators()  # before anything that looks for torch_npu

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from launcher.files.run_folder import shard_files  # noqa: E402
from launcher.runtime.agreement import Agreement, compare, compare_weight_only  # noqa: E402
from launcher.runtime.skeleton import skeleton  # noqa: E402
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint  # noqa: E402
from quant_core.layers.deployed import DeployedLayer  # noqa: E402
from quant_core.schemes import BY_TYPE  # noqa: E402
from quant_core.schemes.scheme import Inputs  # noqa: E402

# Where the classes of replaced layers are.
_HOME = "mindiesd.quantization.layer"
# How many codes the standard deviation of an input spans: some inputs lie beyond the calibrated range.
_CODES = 60
# What the runtime rounds to the dtype of the run.
_ROUNDED = ("weight_scale", "mul_scale", "bias")


@dataclass
class RankAnswer:
    """What one rank found: what was raised, the layers that were replaced, and how far the worst output is off.

    excess: by layer, the largest difference of an output in units of its bound; beyond 1 it is another output.
    """

    error: str = ""
    replaced: list[str] = field(default_factory=list)
    excess: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def answer(runtime: Any, checkpoint: Checkpoint) -> RankAnswer:
    """Load this rank's files into a skeleton of their model, and compare every layer that was replaced."""
    inventory = checkpoint.inventory
    dtype = inventory.dtype if inventory.dtype != torch.float32 else torch.float16
    model, policy = skeleton(checkpoint), runtime.TimestepPolicyConfig()
    if inventory.timesteps is not None:
        static = range(checkpoint.timestep_sep or 0, inventory.timesteps)
        policy.register(static, "static", target="w8a8_static_linear")
    runtime.quantize(model, str(checkpoint.files.description), dtype=dtype, timestep_config=policy)
    modules = {name: module for name, module in model.named_modules() if type(module).__module__ == _HOME}
    found = RankAnswer(replaced=list(modules))
    for name, module in modules.items():
        try:
            found.excess[name] = max(step.excess for step in _agreements(runtime, checkpoint, name, module, dtype))
        except Exception as error:
            found.failed[name] = f"{type(error).__name__}: {error}"
    return found


@torch.no_grad()
def _agreements(
    runtime: Any, checkpoint: Checkpoint, name: str, module: nn.Module, dtype: torch.dtype
) -> Iterator[Agreement]:
    """Yield the agreement of one layer with the quantizer's arithmetic, of each step if it has steps."""
    stored = checkpoint.read_layer(name)
    tensors = {key: t.to(dtype) if key in _ROUNDED else t for key, t in stored.tensors.items()}
    layer, generator = DeployedLayer(stored.arithmetic, tensors), torch.Generator().manual_seed(len(name))
    scheme = BY_TYPE[checkpoint.inventory.layers[name].type]
    for step in range(checkpoint.inventory.timesteps or 0) if scheme.per_step else [None]:
        if step is not None:
            runtime.TimestepManager.set_timestep_idx(step)
        x = _example_input(tensors, step, generator).to(dtype)
        if scheme.inputs is Inputs.FLOAT:
            x_NI = x.reshape(-1, x.shape[-1])
            yield compare_weight_only(module(x_NI), x_NI, tensors)
        else:
            static = "input_scale" in tensors and (step is None or step >= (checkpoint.timestep_sep or 0))
            yield compare(module(x), layer(x, step), x, tensors, step, static=static)


def _example_input(tensors: Mapping[str, Tensor], step: int | None, generator: torch.Generator) -> Tensor:
    """Return (2, 3, I), normal, beyond the calibrated range at its ends; the first token is all zeros."""
    x = torch.randn(2, 3, tensors["weight"].shape[1], generator=generator)
    if "input_scale" in tensors:
        scale = tensors["input_scale"] if step is None else tensors["input_scale"][step]
        x *= _CODES * scale.to(torch.float32)
    if "mul_scale" in tensors:
        x /= tensors["mul_scale"].to(torch.float32)
    x[0, 0] = 0
    return x


def _as_rank(rank: int, world: int) -> None:
    """Be that rank of a group that exchanges nothing: the runtime only asks for the number."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def main(words: list[str]) -> None:
    """Answer for every rank."""
    packages, folder, scheme, suffixes = Path(words[0]), Path(words[1]), words[2], words[3:]
    runtime, answers = import_quantization(packages), []
    for rank, suffix in enumerate(suffixes):
        if suffix:
            _as_rank(rank, len(suffixes))
        try:
            found = answer(runtime, open_checkpoint(shard_files(folder, scheme, suffix)))
        except Exception as error:
            traceback.print_exc()
            found = RankAnswer(error=f"{type(error).__name__}: {error}")
        answers.append(asdict(found))
    print(json.dumps({"operators": OPERATORS, "ranks": answers}))


if __name__ == "__main__":
    main(sys.argv[1:])
