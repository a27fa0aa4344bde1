"""Ranks that hold parts of a model level and rotate them as the whole model is, also heads that others hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core.attention.rotated_values import rotate_values
from quant_core.parallel.groups import Parallel
from tests.support.massive_values import rotations_of, with_massive_values
from tests.support.ranks import folder_of, run_on_ranks
from tests.support.tiny_models import KINDS, example_inputs

pytestmark = pytest.mark.distributed

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
# The most of any weight's largest value, and of the output. float32 itself sums over ranks in another order.
SAME = {"float32": (1e-6, 1e-5), "float64": (1e-14, 1e-12)}


def on_each_rank(results: Path) -> None:
    """Divide and rotate every model; write how far weights and outputs are from the whole model's."""
    found = {f"{kind} {layout} {dtype}": errors(kind, layout, dtype) for kind, layout in LAYOUTS for dtype in SAME}
    (results / f"{dist.get_rank()}.json").write_text(json.dumps(found))


@torch.no_grad()
def errors(kind: str, layout: str, dtype: str) -> list[float]:
    """Return the largest error of this rank's weights against the part of the whole model rotated, and the output's."""
    group, plan = dist.group.WORLD, load_adapter(KINDS[kind][0]).shard_plan(layout)
    whole, divided_first, rotated_first = (with_massive_values(kind).to(getattr(torch, dtype)) for _ in range(3))
    rank = {"tp_rank": dist.get_rank(), "tp_size": dist.get_world_size(), "tp_group": group}
    parallel = Parallel(shards=make_local(divided_first, plan, **rank), tp_group=group)
    rotate_values(divided_first, rotations_of(kind, divided_first, parallel).linears)
    rotate_values(rotated_first, rotations_of(kind, rotated_first).linears)
    make_local(rotated_first, plan, **rank)
    wanted = dict(rotated_first.named_parameters())
    weights = [
        (p - wanted[name]).abs().max() / wanted[name].abs().max() for name, p in divided_first.named_parameters()
    ]
    inputs = {key: to(value, dtype) for key, value in example_inputs(kind).items()}
    exact, output = (model(**inputs)[0] for model in (whole, divided_first))
    return [float(max(weights)), float((output - exact).norm() / exact.norm())]


def to(value: Any, dtype: str) -> Any:
    """Return a tensor of floats in that dtype, anything else as it is."""
    return value.to(getattr(torch, dtype)) if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.fixture(scope="module", params=[2, 4])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Any]:
    """What each rank measured; one start serves all cases of this number of ranks."""
    folder = folder_of(run_on_ranks(request.param, tmp_path_factory.mktemp("ranks"), __name__), __name__)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_parts_are_those_of_the_rotated_model_and_compute_what_it_did(measured, kind: str, layout: str, dtype: str):
    for rank in measured:
        weights, output = rank[f"{kind} {layout} {dtype}"]
        assert weights <= SAME[dtype][0]
        assert output <= SAME[dtype][1]
