"""Ratios add up, and a replayed comparison says of each layer what that layer does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from quant_core.calibration.records import Record
from quant_core.calibration.timestep import TimestepManager
from quant_core.quality.ratio import LIMIT_DB, Ratio, StepRatios, compare, total
from quant_core.quality.replayed import compare_layers, compare_outputs, evenly_spaced, kept_outputs, sampled


class TwoLayers(nn.Module):
    """Two linears, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(x)),)


@pytest.fixture
def model() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers().requires_grad_(False)


def records(steps: list[int | None]) -> list[Record]:
    torch.manual_seed(1)
    return [Record(kwargs={"x": torch.randn(3, 8)}, step=step) for step in steps]


def test_decibels_are_ten_times_the_logarithm_of_signal_over_noise():
    exact = torch.full((4, 10), 2.0)
    assert compare(exact, exact * 1.1).decibels == pytest.approx(20)
    assert compare(exact, exact * 1.1).relative_error == pytest.approx(0.1)
    assert compare(exact, exact).decibels == LIMIT_DB


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_as_far_off_as_can_be(wrong: float):
    assert compare(torch.ones(2, 3), torch.full((2, 3), wrong)).decibels == -LIMIT_DB


def test_the_ratio_of_parts_is_the_ratio_of_the_whole():
    exact, found = torch.randn(6, 8), torch.randn(6, 8)
    parts = [compare(exact[rows], found[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert total(parts).decibels == pytest.approx(compare(exact, found).decibels)
    assert total(parts) == total(reversed(parts))


def test_ratios_of_two_ranks_add_up_step_by_step():
    one, other = StepRatios(), StepRatios()
    one.add(0, Ratio(1, 1))
    other.add(0, Ratio(99, 0))
    other.add(None, Ratio(900, 9))
    one.update(other)
    assert one.steps() == {0: Ratio(100, 1)}
    assert one.overall == Ratio(1000, 10)


def test_each_layer_is_compared_on_the_float_models_own_input(model: TwoLayers):
    """A first layer that is off by 10 % leaves the second one's ratio alone."""
    layers = {
        "first": lambda x, step: model.first.forward(x) * 1.1,
        "second": lambda x, step: model.second.forward(x) * (1.01 if step == 1 else 1.001),
    }
    found = compare_layers(model, layers, layers.__getitem__, records([0, 1, 1]))
    assert found["first"].overall.decibels == pytest.approx(20, abs=1e-3)
    assert {step: round(ratio.decibels) for step, ratio in found["second"].steps().items()} == {0: 60, 1: 40}


def test_a_layer_is_asked_for_only_when_its_turn_comes(model: TwoLayers):
    """So that a caller that reads it from disk holds one layer at a time."""
    asked = []

    def deployed(name: str):
        asked.append(name)
        return lambda x, step: getattr(model, name).forward(x)

    compare_layers(model, ["second", "first"], deployed, records([0, 1]))
    assert asked == ["first", "second"] * 2


def test_a_layer_is_compared_behind_its_collective(model: TwoLayers):
    layers = {"first": lambda x, step: model.first.forward(x) + 1}
    shifted = compare_layers(
        model, layers, layers.__getitem__, records([0]), combines={"first": lambda m, i, y: y + 100}
    )
    alone = compare_layers(model, layers, layers.__getitem__, records([0]))
    assert shifted["first"].overall.decibels > alone["first"].overall.decibels + 30


def test_comparing_leaves_no_hook_and_no_step_behind(model: TwoLayers):
    TimestepManager.set_timestep_idx(None)  # a test of another file may have left one
    layers = {"first": lambda x, step: model.first.forward(x)}
    with kept_outputs(model):
        compare_layers(model, layers, layers.__getitem__, records([3]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert TimestepManager.get_timestep_idx() is None


def test_outputs_are_compared_record_by_record(model: TwoLayers):
    found = records([0, 1, 1])
    with kept_outputs(model) as exact:
        compare_layers(model, [], lambda name: lambda x, step: x, found)
    assert compare_outputs(model, found, exact).overall.decibels == LIMIT_DB
    model.second.weight *= 1.01
    model.second.bias *= 1.01
    assert compare_outputs(model, found, exact).steps()[1].decibels == pytest.approx(40, abs=1e-3)


def test_steps_are_sampled_alike_by_ranks_with_other_records():
    one, other = sampled(records([0, 1, 2, 3, 4]), 3), sampled(records([0, 0, 1, 2, 3, 4, 4]), 3)
    assert [record.step for record in one] == [0, 2, 4]
    assert [record.step for record in other] == [0, 0, 2, 4, 4]
    assert [record.step for record in sampled(records([None, 5]), 1)] == [None, 5]


@pytest.mark.parametrize(
    ("steps", "most", "chosen"),
    [(10, 4, {0, 3, 6, 9}), (50, 2, {0, 49}), (3, 8, {0, 1, 2}), (7, 1, {6}), (0, 4, set())],
)
def test_chosen_steps_span_the_run(steps: int, most: int, chosen: set[int]):
    assert evenly_spaced(range(steps), most) == chosen
