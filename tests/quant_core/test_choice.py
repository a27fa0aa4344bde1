"""The least error at the output that a budget allows, and a table that says why."""

from __future__ import annotations

import pytest

from quant_core.errors import ConfigurationError
from quant_core.quality.budget import BUDGETS, COSTS, Budget
from quant_core.quality.choice import Candidate, Choice, choose
from quant_core.schemes.treatment import Treatment

BYTES = {"float": 2.0, "w8a16": 1.0, "w8a8": 1.0, "w8a8_dynamic": 1.0}


def layer(work: float, **errors: float) -> tuple[float, list[Candidate]]:
    """Return work and candidates; a name that ends in `_smooth` is a smoothed treatment."""
    found = []
    for name, error in errors.items():
        treatment = Treatment(name.removesuffix("_smooth"), smoothed=name.endswith("_smooth"))
        scheme = treatment.scheme
        found.append(Candidate(treatment, error, work * COSTS[scheme], work * BYTES[scheme]))
    return work, found


TWO = {
    "a": layer(1, w8a8=4e-4, w8a8_dynamic=1e-4, float=0),
    "b": layer(1, w8a8=1e-4, w8a8_dynamic=0.9e-4, float=0),
}


def chosen(choice: Choice) -> dict[str, str]:
    """Return the scheme of each layer."""
    return {layer.name: layer.chosen.treatment.scheme for layer in choice.layers}


def test_the_example_of_the_documentation():
    choice = choose(TWO, Budget(dynamic=0.5, cost=1.08))
    assert chosen(choice) == {"a": "w8a8_dynamic", "b": "w8a8"}
    assert choice.error == pytest.approx(2e-4)
    assert choice.sqnr == pytest.approx(37, abs=0.1)
    assert (choice.static_share, choice.cost) == (0.5, pytest.approx(1.075))


@pytest.mark.parametrize(("word", "expected"), [("speed", 0), ("balanced", 0), ("quality", 2)])
def test_a_word_bounds_the_share_that_is_not_static(word: str, expected: int):
    """A third of two equal layers is less than one of them."""
    found = chosen(choose(TWO, BUDGETS[word]))
    assert sum(scheme == "w8a8_dynamic" for scheme in found.values()) == expected


def test_a_small_layer_may_be_dear_where_the_large_ones_are_static():
    found = choose(TWO | {"norm": layer(0.001, w8a8=1e-3, w8a8_dynamic=5e-4, w8a16=1e-6)}, BUDGETS["balanced"])
    assert chosen(found)["norm"] == "w8a16"
    assert found.static_share > 2 / 3


def test_nothing_more_is_spent_than_the_wanted_quality_needs():
    assert chosen(choose(TWO, Budget(sqnr=36.5))) == {"a": "w8a8_dynamic", "b": "w8a8"}
    assert chosen(choose(TWO, Budget(sqnr=33))) == {"a": "w8a8", "b": "w8a8"}


def test_bytes_are_a_limit_of_their_own():
    free = choose(TWO, Budget(cost=9.0, bytes=99))
    assert set(chosen(free).values()) == {"float"}
    assert set(chosen(choose(TWO, Budget(cost=9.0, bytes=2.5))).values()) == {"w8a8_dynamic"}


@pytest.mark.parametrize("most", [0, 1.5])
def test_layers_that_do_not_fit_in_the_bytes_are_refused_with_what_they_need(most: float):
    with pytest.raises(ConfigurationError, match=f"do not fit in {most:.0f} bytes") as caught:
        choose(TWO, Budget(bytes=most))
    assert "bytes=2 or more" in str(caught.value)


def test_a_layer_of_one_candidate_is_spent_for_and_has_it():
    """The budget allows half of the work to be dynamic, and the given layer takes all of it."""
    found = choose({"a": TWO["a"], "b": layer(1, w8a8_dynamic=3e-4)}, Budget(dynamic=0.5))
    assert chosen(found) == {"a": "w8a8", "b": "w8a8_dynamic"}
    assert found.layers[1].reason == "nothing else may be chosen"


def test_a_layer_that_smoothing_makes_worse_is_left_plain_and_the_table_says_so():
    found = choose({"a": layer(1, w8a8=1e-4, w8a8_smooth=2e-4), "b": layer(1, w8a8=3e-4, w8a8_smooth=1e-4)}, Budget())
    assert found.layer_schemes == {"a": "w8a8:plain", "b": "w8a8"}
    assert "outlier suppression does not help it (2.0e-04, plain 1.0e-04)" in found.layers[0].reason


def test_no_layer_is_ever_worse_than_its_plain_cheapest_treatment():
    found = choose({"a": layer(1, w8a8=1e-4, w8a8_dynamic=2e-4, w8a8_smooth=1e-3)}, BUDGETS["quality"])
    assert found.layer_schemes == {"a": "w8a8:plain"}


def test_costs_that_were_measured_replace_the_table():
    """On a card where dynamic is as fast as static there is no reason against it."""
    same = {"a": (1.0, [Candidate(c.treatment, c.error, 1.0, c.bytes) for c in TWO["a"][1][:2]])}
    choice = choose(same, Budget(cost=1.0), {**COSTS, "w8a8_dynamic": 1.0})
    assert chosen(choice) == {"a": "w8a8_dynamic"}
