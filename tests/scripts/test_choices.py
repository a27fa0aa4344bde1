"""Measurements of the quantizer's own choices: what they compare is what they say."""

from __future__ import annotations

from pathlib import Path

from scripts.choices.asked import Asked, mean_and_error
from scripts.choices.restep import compared, published
from scripts.choices.separator import Sweep


def test_rows_of_the_same_steps_paint_the_same_pictures(tmp_path: Path):
    subject = Asked(tmp_path, ["flux"], [0], pictures=1).subject("flux", 0, steps=2)
    calibrated, restepped = compared(subject, published(subject))
    assert calibrated == restepped
    assert calibrated[0] > 10


def test_a_sweep_knows_its_best_separator_and_what_the_advised_one_loses():
    sweep = Sweep(advised=1, outputs=[20.0, 29.5, 30.0, 30.0])
    assert (sweep.best, sweep.lost) == (2, 0.5)


def test_a_mean_has_its_standard_error_where_there_are_several_values():
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.00 ± 0.58"
    assert mean_and_error([1.0]) == "1.00"
