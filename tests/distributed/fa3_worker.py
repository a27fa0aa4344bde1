"""One rank of the FA3 proof: quantizes its part of a model, or of the records, and writes the attention scales.

Usage: torchrun ... fa3_worker.py RESULTS_FOLDER. Rank r writes RESULTS_FOLDER/<case>_<r>.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core import FA3ProcessorConfig, SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from quant_core.parallel.groups import Parallel
from tests.support.tiny_models import KINDS, build, example_inputs

TENSOR_PARALLEL = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
# "*" keeps every linear float: then a rank's heads see the very numbers that they see in the whole model.
DISABLED = {"float": ["*"], "quantized": []}


def records(kind: str, count: int) -> list[dict[str, Any]]:
    """Return different records, the same ones for the same count."""
    base = example_inputs(kind)
    return [{"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + i)}} for i in range(count)]


def scales(
    model: Any, kind: str, folder: Path, calib_data: Sequence[Any], disabled: list[str], parallel: Parallel
) -> Any:
    """Run an FA3 session and return what it wrote for the attentions."""
    config = SessionConfig(
        processor_cfg_map={
            "w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=disabled),
            "fa3": FA3ProcessorConfig(),
            "save": SaveProcessorConfig(output_path=str(folder)),
        },
        calib_data=calib_data,
    )
    quant_model(model, config, structure=load_adapter(KINDS[kind][0]).structure, parallel=parallel)
    written = load_file(folder / "quant_model_weight_w8a8_dynamic.safetensors")
    return {name: tensor for name, tensor in written.items() if ".fa_" in name}


def tensor_parallel_scales(kind: str, layout: str, folder: Path, disabled: list[str]) -> Any:
    """Return the scales of this rank's heads."""
    model, group = build(kind), dist.group.WORLD
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    shards = make_local(model, plan, tp_rank=dist.get_rank(), tp_size=dist.get_world_size(), tp_group=group)
    parallel = Parallel(shards=shards, tp_group=group)
    return scales(model, kind, folder, records(kind, 2), disabled, parallel)


def data_parallel_scales(kind: str, folder: Path, mine: Sequence[Any]) -> Any:
    """Return the scales that all ranks agreed on, each having replayed its own records."""
    return scales(build(kind), kind, folder, mine, [], Parallel(dp_group=dist.group.WORLD))


def main() -> None:
    """Join the gloo group, run every case and write its scales."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), Path(sys.argv[1])
    session = results / f"session_{rank}"
    for kind, layout in TENSOR_PARALLEL:
        for name, disabled in DISABLED.items():
            found = tensor_parallel_scales(kind, layout, session, disabled)
            save_file(found, results / f"{kind}_{layout}_{name}_{rank}.safetensors")
    split = data_parallel_scales("flux", session, records("flux", 3)[rank::2])
    save_file(split, results / f"split_{rank}.safetensors")
    idle = data_parallel_scales("flux", session, records("flux", 3) if rank else [])
    save_file(idle, results / f"idle_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
