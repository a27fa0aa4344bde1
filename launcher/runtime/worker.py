"""A process that loads a checkpoint with the real MindIE-SD and computes with every layer that it replaced.

    python -m launcher.runtime.worker PACKAGES FOLDER SCHEME SUFFIX...

PACKAGES holds the package `mindiesd`. For each rank, by the suffix of its files, it loads them as that rank of as many
as there are, compares each replaced layer with the arithmetic that the quantizer had in mind, and prints a JSON answer.
Operators are the stand-in's, on the CPU, also where torch_npu is installed: the answer is the same on every machine.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.runtime.importing import import_quantization
from launcher.runtime.npu_operators import install

install()  # before anything that looks for torch_npu

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launcher.files.run_folder import shard_files  # noqa: E402
from launcher.runtime.agreement import agreements, replaced  # noqa: E402
from launcher.runtime.skeleton import skeleton  # noqa: E402
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint  # noqa: E402


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
    modules = replaced(model)
    found = RankAnswer(replaced=list(modules))
    for name, module in modules.items():
        try:
            found.excess[name] = max(step.excess for step in agreements(runtime, checkpoint, name, module, dtype))
        except Exception as error:
            found.failed[name] = f"{type(error).__name__}: {error}"
    return found


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
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
