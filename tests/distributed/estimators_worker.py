"""One rank of the estimators' proof: static ranges of its part of a model, or of its part of the records.

Usage: torchrun ... estimators_worker.py FOLDER. Rank r writes FOLDER/<case>_<estimator>_<r>.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core import SessionConfig, W8A8ProcessorConfig, W8A8QuantConfig, quant_model
from quant_core.parallel.groups import Parallel
from quant_core.ranges import ESTIMATORS
from tests.distributed.fa3_worker import records
from tests.support.tiny_models import build

NAMES = sorted(ESTIMATORS["float32"])
KIND, LAYOUT = "sd3", "megatron"


def ranges(model: Any, act_method: Any, calib_data: Sequence[Any], parallel: Parallel) -> dict[str, Tensor]:
    """Quantize with static ranges and return each layer's scale and offset."""
    scheme = W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=act_method))
    config = SessionConfig(processor_cfg_map={"w8a8": scheme}, calib_data=calib_data)
    found = quant_model(model, config, parallel=parallel)
    return {
        f"{name}.{part}": layer.tensors[part].clone()
        for name, layer in found.layers.items()
        for part in ("input_scale", "input_offset")
    }


def tensor_parallel_ranges(act_method: str) -> dict[str, Tensor]:
    """Return the ranges of this rank's slices, with scales that are to be those of the whole layers."""
    model, group = build(KIND), dist.group.WORLD
    plan = load_adapter(KIND).shard_plan(LAYOUT)
    shards = make_local(model, plan, tp_rank=dist.get_rank(), tp_size=dist.get_world_size(), tp_group=group)
    return ranges(model, act_method, records(KIND, 2), Parallel(shards=shards, tp_group=group, scale_sync="global"))


def main() -> None:
    """Join the gloo group, run every estimator and write its ranges."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), Path(sys.argv[1])
    for name in NAMES:
        save_file(tensor_parallel_ranges(name), results / f"tensor_{name}_{rank}.safetensors")
        mine = records(KIND, 3)[rank::2]
        split = ranges(build(KIND), name, mine, Parallel(dp_group=dist.group.WORLD))
        save_file(split, results / f"data_{name}_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
