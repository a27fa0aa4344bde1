"""Static ranges of two ranks are those of one, with every estimator, replayed and online."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core import SessionConfig, W8A8ProcessorConfig, W8A8QuantConfig, quant_model
from quant_core.calibration.records import as_records
from quant_core.calibration.replay import replay
from quant_core.parallel.groups import Parallel
from quant_core.ranges import ESTIMATORS
from quant_core.session.online import OnlineCalibration
from tests.support.tiny_models import build, louder_records

pytestmark = pytest.mark.distributed

RANKS = 2
# Sums over two ranks are in another order. Measured: no scale moves by more than its last bit, 2.4e-7. On another
# processor a code of an activation may flip, and then a later range moves by a fraction of a step of 1/255.
MEDIAN_TOLERANCE, SCALE_TOLERANCE = 1e-6, 1e-2

# Online ranges are taken from the float model's own forwards.
NAMES = [f"{name}{way}" for name in sorted(ESTIMATORS["float32"]) for way in ("", "_online")]
KIND, LAYOUT = "sd3", "megatron"


def ranges(model: Any, name: str, calib_data: Sequence[Any], parallel: Parallel) -> dict[str, Tensor]:
    """Quantize with static ranges and return each layer's scale and offset."""
    act_method: Any = name.removesuffix("_online")
    scheme = W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=act_method))
    config = SessionConfig(processor_cfg_map={"w8a8": scheme}, calib_data=calib_data)
    if name.endswith("_online"):
        online = OnlineCalibration(model, config, parallel=parallel)
        with online.watching():
            replay(model, as_records(calib_data), stage="calibrate")
        config = config.model_copy(update={"calib_data": online.measured()})
    found = quant_model(model, config, parallel=parallel)
    return {
        f"{name}.{part}": layer.tensors[part].clone()
        for name, layer in found.layers.items()
        for part in ("input_scale", "input_offset")
    }


def tensor_parallel_ranges(name: str) -> dict[str, Tensor]:
    """Return the ranges of this rank's slices, with scales that are to be those of the whole layers."""
    model, group = build(KIND), dist.group.WORLD
    plan = load_adapter(KIND).shard_plan(LAYOUT)
    shards = make_local(model, plan, tp_rank=dist.get_rank(), tp_size=dist.get_world_size(), tp_group=group)
    return ranges(model, name, louder_records(KIND, 2), Parallel(shards=shards, tp_group=group, scale_sync="global"))


def on_each_rank(results: Path) -> None:
    """Run every estimator and write its ranges, `<case>_<estimator>_<rank>.safetensors`."""
    rank = dist.get_rank()
    for name in NAMES:
        save_file(tensor_parallel_ranges(name), results / f"tensor_{name}_{rank}.safetensors")
        mine = louder_records(KIND, 3)[rank::2]
        split = ranges(build(KIND), name, mine, Parallel(dp_group=dist.group.WORLD))
        save_file(split, results / f"data_{name}_{rank}.safetensors")


def of_ranks(results: Path, case: str) -> list[dict[str, Tensor]]:
    """Read what each rank wrote."""
    return [load_file(results / f"{case}_{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_ranges_over_shared_out_records_are_those_of_one_rank_with_all(results, name):
    whole = ranges(build(KIND), name, louder_records(KIND, 3), Parallel())
    for shared in of_ranks(results, f"data_{name}"):
        assert shared.keys() == whole.keys()
        assert all(torch.equal(shared[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_on_the_range_of_every_layer(results, name):
    first, second = of_ranks(results, f"tensor_{name}")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_of_slices_with_global_scales_are_those_of_the_whole_layers(results, name):
    whole = ranges(build(KIND), name, louder_records(KIND, 2), Parallel())
    sliced = of_ranks(results, f"tensor_{name}")[0]
    scales = [key for key in whole if key.endswith("input_scale")]
    errors = torch.tensor([(sliced[key] / whole[key] - 1).abs().item() for key in scales])
    assert errors.median() < MEDIAN_TOLERANCE
    assert errors.max() < SCALE_TOLERANCE
