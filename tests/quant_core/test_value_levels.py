"""Values are levelled before they are rotated, so that no channel drowns the others of its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.attention.value_levels import value_levels
from quant_core.parallel.groups import Parallel
from tests.support.massive_values import CHANNEL, GAIN, rotations_of, with_massive_values
from tests.support.tiny_models import HEAD_DIM


def attention(made_by: Tensor, read_by: Tensor, bias: Tensor | None = None) -> nn.ModuleDict:
    """Return linears with these weights that make values and read what becomes of them."""
    outputs, inputs = made_by.shape
    linears = {"v": nn.Linear(inputs, outputs, bias is not None), "out": nn.Linear(outputs, len(read_by), False)}
    linears["v"].weight, linears["out"].weight = nn.Parameter(made_by), nn.Parameter(read_by)
    if bias is not None:
        linears["v"].bias = nn.Parameter(bias)
    return nn.ModuleDict(linears).requires_grad_(False)


def levels_of(*weights: Any) -> list[int]:
    model = attention(*weights)
    columns = model["out"].in_features
    found = value_levels(model, {"v": None, "out": columns}, model.get_parameter, Parallel())
    assert found["v"] == found["out"]
    return list(found["v"])


def test_a_massive_channel_is_divided_by_what_it_is_larger():
    """The worked example: 2 ** (10 / 2) = 32."""
    assert levels_of(torch.diag(torch.tensor([32.0, 1, 1, 1])), torch.diag(torch.tensor([1 / 32, 1, 1, 1]))) == [
        10,
        0,
        0,
        0,
    ]


def test_a_bias_makes_a_channel_larger_too():
    assert levels_of(torch.eye(2), torch.eye(2), torch.tensor([0.0, 255.0**0.5])) == [0, 4]


@pytest.mark.parametrize("nothing", [0.0, float("inf"), float("nan")])
def test_a_channel_that_nothing_makes_or_reads_stays(nothing: float):
    broken = torch.diag(torch.tensor([nothing, 4.0]))
    assert levels_of(broken, torch.eye(2)) == [0, 2]
    assert levels_of(torch.eye(2), broken) == [0, -2]


@pytest.mark.parametrize("seed", range(5))
def test_a_levelled_head_costs_no_more_than_a_scale_for_each_channel(seed: int):
    generator = torch.Generator().manual_seed(seed)
    made, worth = torch.randn(2, 64, generator=generator).mul(torch.tensor([[2.0], [0.5]])).exp()
    read = worth / made
    divisors = torch.tensor(levels_of(torch.diag(made), torch.diag(read))).div(2).exp2()

    def cost(factor: Tensor) -> float:
        return float((made / factor).square().sum() * (read * factor).square().sum() / len(made))

    own, best = float(worth.square().sum()), cost((made / read).sqrt())
    assert cost(divisors) < 1.06 * best < own
    assert cost(torch.ones(64)) > 10 * own


@pytest.mark.parametrize("kind", ["flux", "sd3", "sd35"])
def test_rows_and_columns_around_every_attention_have_equal_norms(kind: str):
    model = with_massive_values(kind)
    found = rotations_of(kind, model)
    for names in found.attentions.values():
        rotations = [found.linears[name] for name in names]
        assert len({rotation.levels for rotation in rotations}) == 1
        levels = torch.tensor(rotations[0].levels).unflatten(0, (-1, HEAD_DIM))
        # The gain is on both sides, so its whole comes out.
        others = [channel for channel in range(HEAD_DIM) if channel != CHANNEL]
        difference = levels[:, CHANNEL].float().mean() - levels[:, others].float().mean()
        assert 2 ** (float(difference) / 2) == pytest.approx(GAIN, rel=0.15)
