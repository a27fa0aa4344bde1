"""Heads stay whole under tensor parallelism, so a part of a rotated model is the rotated part of the model."""

from __future__ import annotations

import pytest
import torch

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core.attention.rotated_values import rotate_values
from quant_core.parallel.groups import Parallel
from tests.support.massive_values import rotations_of, with_massive_values
from tests.support.tiny_models import KINDS

# Where no linear sees the heads of other ranks, ranks need not ask each other; tests/distributed has the others.
LAYOUTS = [("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_rotating_before_and_after_dividing_is_the_same(kind: str, layout: str, tp_size: int, dtype: torch.dtype):
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    whole = with_massive_values(kind).to(dtype)
    rotate_values(whole, rotations_of(kind, whole).linears)
    for rank in range(tp_size):
        divided_first, rotated_first = (with_massive_values(kind).to(dtype) for _ in range(2))
        rotated_first.load_state_dict(whole.state_dict())
        shards = make_local(divided_first, plan, tp_rank=rank, tp_size=tp_size, tp_group=None)
        make_local(rotated_first, plan, tp_rank=rank, tp_size=tp_size, tp_group=None)
        rotate_values(divided_first, rotations_of(kind, divided_first, Parallel(shards=shards)).linears)
        wanted = dict(rotated_first.named_parameters())
        for name, part in divided_first.named_parameters():
            assert (part - wanted[name]).abs().max() <= EXACT[dtype] * wanted[name].abs().max(), (rank, name)
