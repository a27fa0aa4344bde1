"""What is chosen by measurement, as the table and the options that follow from it say it."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.cli.command_line import parse
from launcher.config.job_config import Quantization
from launcher.config.layer_schemes import words_of
from launcher.stages.choose import given_layers, holding, table_of, with_choice
from launcher.stages.processors import layer_schemes, processors, session_of
from quant_core.calibration.records import as_records
from quant_core.errors import ConfigurationError
from quant_core.quality.decide import measure_layers
from quant_core.session.targets import layer_plan
from tests.support.mixer import STEPS, STRUCTURE, Mixer, records

JOB = ["flux", "--path", "x", "--do_quant", "--quant_weight_save_folder", "w", "--quant_dump_calib_folder", "d"]


def options(*words: str) -> Quantization:
    return parse([*JOB, "--infer_steps", str(STEPS), *words]).options.quantization


def table(wanted: Quantization, data: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Measure the model as a job does, and return what is chosen."""
    model = Mixer()
    session = session_of(processors(wanted, []), wanted, as_records(data or records()))
    given = given_layers(model, session, wanted)
    return table_of(measure_layers(model, session, given=given, structure=STRUCTURE), wanted, STEPS)


def test_a_separator_is_chosen_for_layers_that_auto_would_not_make_static():
    """One token in each record is no range that auto trusts; a person who asks for it gets it."""
    few = [record | {"args": [record["args"][0][:, :1]]} for record in records()]
    found = table(options("--quant_type", "w8a8_timestep", "--timestep_sep", "auto"), few)
    assert 0 <= found["timestep_sep"] <= STEPS
    assert len(found["steps"]) == STEPS
    assert all(row["static_db"] <= row["dynamic_db"] for row in found["steps"])


@pytest.mark.parametrize("rule", ["w8a16", "w8a8:plain"])
def test_a_persons_rule_is_what_the_table_counts_and_begins_with(rule: str):
    wanted = options("--quant_type", "auto", "--budget", "quality", "--layer_schemes", f"fir*={rule}")
    found = table(wanted)
    assert list(found["layer_schemes"]) == ["fir*", "second"]
    first, second = found["decisions"]
    assert (found["layer_schemes"]["fir*"], first["reason"]) == (rule, "nothing else may be chosen")
    assert len(first["error_db"]) == 1 < len(second["error_db"])
    chosen = with_choice(wanted, found)
    assert list(layer_schemes(chosen)) == ["fir*", "second"]
    plan = layer_plan(Mixer(), session_of(processors(chosen, []), chosen, []))
    assert [plan["first"].key, plan["first"].smoothed] == [rule.removesuffix(":plain"), ":plain" not in rule]
    static = 1.0 if rule != "w8a16" else 0.0
    assert found["expected"]["static_share"] in (static / 2, (1 + static) / 2)  # two layers of equal work


def test_the_line_that_uses_the_table_again_says_all_that_auto_did():
    words = ["--anti_method", "m6", "--anti_alpha", "0.5", "--anti_beta", "0.25", "--budget", "speed"]
    wanted = options("--quant_type", "auto", *words)
    held = holding(wanted, {"layer_schemes": {"first": "w8a8_timestep", "second": "w8a16"}})
    again = options(*words_of({**held, "layer_schemes": "first=w8a8_timestep"}))
    assert (again.anti_method, again.anti_alpha, again.anti_beta, again.anti_groups) == ("m6", 0.5, 0.25, "every")
    chosen = with_choice(wanted, {"layer_schemes": again.layer_schemes})
    assert layer_schemes(again) == layer_schemes(chosen)
    assert "timestep_sep" not in holding(wanted, {"layer_schemes": {"first": "w8a8"}})
    assert holding(wanted, {"layer_schemes": {"first": "w8a8_timestep"}, "timestep_sep": 2})["timestep_sep"] == 2


def test_a_quality_that_the_budget_does_not_reach_is_said():
    assert table(options("--quant_type", "auto", "--budget", "speed", "sqnr=99"))["expected"]["not_reached_db"] == 99
    assert "not_reached_db" not in table(options("--quant_type", "auto", "--budget", "speed", "sqnr=9"))["expected"]


def test_layers_that_do_not_fit_are_refused_with_the_bytes_they_need():
    with pytest.raises(ConfigurationError, match="do not fit in 0 bytes"):
        table(options("--quant_type", "auto", "--budget", "bytes=0"))


@pytest.mark.parametrize(("word", "advice"), [("fast", "speed, balanced, quality"), ("cots=1", "cost (nearest name)")])
def test_what_is_no_budget_is_answered_with_words_for_a_word_and_numbers_for_a_number(word: str, advice: str):
    with pytest.raises(ConfigurationError, match="no budget is called") as caught:
        options("--quant_type", "auto", "--budget", word)
    assert advice in caught.value.advice
