"""`--layer_schemes` as words, as a map in YAML and as a file: one map, whose order counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_from_yaml
from launcher.stages.processors import layer_schemes
from quant_core.errors import ConfigurationError

JOB = ["flux", "--path", "x", "--do_quant", "--quant_weight_save_folder", "w", "--quant_dump_calib_folder", "d"]
# In this order the first layer is dynamic; sorted, it would be of the second kind.
WORDS = ["z.*=w8a8_dynamic", "*=w8a16"]


def job(*words: str, **more: str) -> JobConfig:
    flags = [word for name, value in more.items() for word in (f"--{name}", value)]
    return parse([*JOB, "--quant_type", "w8a8", *flags, "--layer_schemes", *words]).options


def test_words_a_map_and_a_file_say_the_same_in_the_same_order(tmp_path: Path):
    file = tmp_path / "rules.yaml"
    file.write_text("layer_schemes:\n  z.*: w8a8_dynamic\n  '*': w8a16\ndecisions: []\n")
    expected = [("z.*", "w8a8_dynamic"), ("*", "w8a16")]
    for found in (job(*WORDS), job(f"@{file}"), job(WORDS[0], f"@{file}")):
        assert list(found.quantization.layer_schemes.items()) == expected
    again = job_from_yaml(job(*WORDS).to_yaml())
    assert list(again.quantization.layer_schemes.items()) == expected


def test_words_in_front_of_a_file_take_the_layers_that_the_file_names_one_by_one(tmp_path: Path):
    file = tmp_path / "decisions.yaml"
    file.write_text("layer_schemes: {a.to_k: w8a8, a.to_q: w8a8, 'b.*': w8a16}\n")
    found = job("*.to_k=float", f"@{file}").quantization.layer_schemes
    assert list(found.items()) == [("*.to_k", "float"), ("a.to_q", "w8a8"), ("b.*", "w8a16")]
    behind = job(f"@{file}", "*.to_k=float").quantization.layer_schemes
    assert list(behind) == ["a.to_k", "a.to_q", "b.*", "*.to_k"]


def test_a_scheme_can_be_left_without_smoothing_and_takes_the_jobs_separator():
    found: dict[str, Any] = layer_schemes(job("a=w8a8_timestep:plain", "b=float", timestep_sep="3").quantization)
    assert (found["a"].key, found["a"].smoothed, found["a"].timestep_sep) == ("w8a8_timestep", False, 3)
    assert found["b"] == "float"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("to_q", "'to_q' names no scheme"),
        ("=w8a8", "names no scheme"),
        ("to_q=w8a8_dynamc", "w8a8_dynamic (nearest name)"),
        ("to_q=float:plain", "no scheme is called 'float:plain'"),
        ("@/nowhere.yaml", "cannot read '/nowhere.yaml'"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_word(word: str, says: str):
    with pytest.raises(ConfigurationError) as caught:
        job(word)
    assert says in str(caught.value)


def test_an_option_of_static_layers_has_a_meaning_where_only_some_layers_are_static():
    words = [*JOB, "--quant_type", "w8a8_dynamic", "--act_method", "mse"]
    with pytest.raises(ConfigurationError, match="no meaning for w8a8_dynamic"):
        parse(words)
    assert parse([*words, "--layer_schemes", "*.to_q=w8a8"]).options.quantization.act_method == "mse"


def test_a_file_that_says_which_options_it_holds_with_is_refused_by_a_job_that_has_others(tmp_path: Path):
    file = tmp_path / "quant_decisions.yaml"
    held = {"quant_type": "w8a8", "timestep_sep": 0, "anti_method": "m4", "anti_groups": "every"}
    file.write_text(yaml.safe_dump({"holds_with": held, "layer_schemes": {"*": "w8a8_timestep"}}, sort_keys=False))
    with pytest.raises(ConfigurationError) as caught:
        job(f"@{file}", anti_groups="every", anti_method="m6")
    assert caught.value.where == "--timestep_sep, --anti_method"
    assert "timestep_sep is 0, and the job's is left out; anti_method is m4, and the job's is m6" in str(caught.value)
    assert "add --timestep_sep 0 --anti_method m4, or take holds_with out of the file" in str(caught.value)
    again = job(f"@{file}", timestep_sep="0", anti_method="m4", anti_groups="every")
    assert job_from_yaml(again.to_yaml()) == again
    measured_again = parse([*JOB, "--quant_type", "auto", "--layer_schemes", f"@{file}"]).options
    assert measured_again.quantization.layer_schemes == {"*": "w8a8_timestep"}


def test_an_option_that_no_job_has_is_not_held_by_any(tmp_path: Path):
    file = tmp_path / "quant_decisions.yaml"
    file.write_text("holds_with: {anti_metod: m4}\nlayer_schemes: {'*': w8a16}\n")
    with pytest.raises(ConfigurationError, match="anti_metod is m4, and the job's is left out"):
        job(f"@{file}")
