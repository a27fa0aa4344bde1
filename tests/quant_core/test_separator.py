"""The first static step: the least that costs no quality, from the error of every step."""

from __future__ import annotations

import math

import pytest

from quant_core.quality.decide import LayerErrors, step_errors
from quant_core.quality.separator import advised_separator, every_step
from quant_core.schemes.treatment import Treatment


@pytest.mark.parametrize(
    ("static", "dynamic", "expected"),
    [
        ([9, 4, 1.1, 1], [1, 1, 1, 1], 2),  # the example of the documentation
        ([9, 9, 9, 9], [1, 1, 1, 1], 4),
        ([1, 1, 1, 1], [1, 1, 1, 1], 0),
        ([1, 1, 9, 9], [1, 1, 1, 1], 4),  # early steps are dynamic only because late ones have to be
        ([9, 1, 1, 1], [1, 3, 3, 3], 1),  # static is better where a token's own range is not the better one
    ],
)
def test_the_least_separator_within_a_fifth_of_a_decibel_of_the_best(static, dynamic, expected: int):
    assert advised_separator(static, dynamic) == expected


def test_steps_between_sampled_ones_lie_on_a_line_of_decibels():
    found = every_step({0: 1e-4, 2: 1e-2, 3: 1e-3}, 5)
    assert [round(10 * math.log10(error)) for error in found] == [-40, -30, -20, -30, -30]


def test_only_layers_that_know_the_step_run_dynamic_below_the_separator():
    treatments = [Treatment(name) for name in ("w8a8", "w8a8_timestep", "w8a8_dynamic")]
    errors = {treatment: {0: 3.0 - i, 1: 3.0 - i} for i, treatment in enumerate(treatments)}
    layers = {name: LayerErrors(1.0, errors, {}) for name in ("a", "b")}
    static, dynamic = step_errors(layers, {"a": treatments[0], "b": treatments[1]}, 2)
    assert static == pytest.approx([5, 5])
    assert dynamic == pytest.approx([4, 4])
