"""Heads stay whole under tensor parallelism, so a part of a rotated model is the rotated part of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core.attention.rotated_values import find_rotations, rotate_values
from quant_core.naming import linear_names
from quant_core.parallel.groups import Parallel
from quant_core.parallel.sharding import Shard
from tests.support.tiny_models import KINDS, build

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-14}


def rotated(kind: str, model: Any, shards: dict[str, Shard]) -> Any:
    structure, parallel = load_adapter(KINDS[kind][0]).structure, Parallel(shards=shards)
    found = find_rotations(model, structure, targets=linear_names(model), parallel=parallel)
    rotate_values(model, found.linears)
    return model


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_rotating_before_and_after_dividing_is_the_same(kind: str, layout: str, tp_size: int, dtype: torch.dtype):
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    whole = rotated(kind, build(kind).to(dtype), {})
    for rank in range(tp_size):
        divided_first, rotated_first = build(kind).to(dtype), build(kind).to(dtype)
        rotated_first.load_state_dict(whole.state_dict())
        shards = make_local(divided_first, plan, tp_rank=rank, tp_size=tp_size, tp_group=None)
        make_local(rotated_first, plan, tp_rank=rank, tp_size=tp_size, tp_group=None)
        rotated(kind, divided_first, shards)
        wanted = dict(rotated_first.named_parameters())
        for name, part in divided_first.named_parameters():
            assert (part - wanted[name]).abs().max() <= EXACT[dtype] * wanted[name].abs().max(), (rank, name)
