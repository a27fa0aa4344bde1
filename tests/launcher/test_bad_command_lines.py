"""Every wrong command line is refused with a message of its own, before anything is looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from quant_core.errors import ConfigurationError

# A sound job; its folders need not exist, because nothing looks into them yet.
JOB = [
    "flux", "--path", "model", "--device", "cpu", "--width", "64", "--height", "64", "--infer_steps", "2", "--do_quant",
    "--quant_weight_save_folder", "weights", "--quant_dump_calib_folder", "dumps",
]  # fmt: skip

MEASURED = ("--quant_type", "w8a8_timestep", "--timestep_sep", "auto")


def without(flag: str) -> list[str]:
    """Return the words of the job without a flag and its value."""
    index = JOB.index(flag)
    return JOB[:index] + JOB[index + (1 if flag == "--do_quant" else 2) :]


CASES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "the command is missing"),
    "unknown command": (["fluxx"], "no command is called 'fluxx'"),
    "unknown flag": ([*JOB, "--colour", "red"], "no flag is called '--colour'"),
    "stray word": ([*JOB, "stray"], "'stray' belongs to no flag"),
    "flag without its value": ([*JOB, "--width"], "--width: expected one argument"),
    "width that is no number": ([*JOB, "--width", "big"], "--width cannot be 'big'"),
    "width that does not fit the patches": ([*JOB, "--width", "100"], "--width cannot be '100'"),
    "no steps": ([*JOB, "--infer_steps", "0"], "--infer_steps cannot be '0'"),
    "negative seed": ([*JOB, "--seed", "-1"], "--seed cannot be '-1'"),
    "unknown scheme": ([*JOB, "--quant_type", "w4a4"], "--quant_type cannot be 'w4a4'"),
    "unknown device": ([*JOB, "--device", "tpu"], "--device cannot be 'tpu'"),
    "unknown device type": ([*JOB, "--device_type", "A3"], "--device_type cannot be 'A3'"),
    "nothing to do": (without("--do_quant"), "this run would produce nothing"),
    "no folder for weights": (without("--quant_weight_save_folder"), "--quant_weight_save_folder is missing"),
    "no folder for dumps": (without("--quant_dump_calib_folder"), "--quant_dump_calib_folder is missing"),
    "folder whose name is no text": (
        [*without("--quant_weight_save_folder"), "--quant_weight_save_folder", os.fsdecode(b"caf\xe9")],
        "--quant_weight_save_folder is no text",
    ),
    "no model": (without("--path"), "--path is missing"),
    "boundary of steps without steps": (
        [*JOB, "--quant_type", "w8a8", "--timestep_sep", "1"],
        "--timestep_sep 1 has no meaning for w8a8",
    ),
    "boundary beyond the steps": ([*JOB, "--timestep_sep", "9"], "lies beyond the last of 2 steps"),
    "exponent without its method": ([*JOB, "--anti_alpha", "0.5"], "--anti_alpha 0.5 has no meaning"),
    "exponent beyond 1": ([*JOB, "--anti_method", "m4", "--anti_alpha", "2"], "--anti_alpha cannot be '2'"),
    "groups of smoothing that auto chooses": (
        [*JOB, "--quant_type", "auto", "--anti_groups", "all"],
        "--anti_groups has no meaning for auto",
    ),
    "exponent that auto does not try": (
        [*JOB, "--quant_type", "auto", "--anti_beta", "0.5"],
        "--anti_beta 0.5 has no meaning for m4",
    ),
    "plain layers behind fused smoothing": (
        [*JOB, "--quant_type", "w8a8", "--anti_method", "m4", "--anti_fused", "--layer_schemes", "*.to_k=w8a8:plain"],
        "no layer can be left without outlier suppression with --anti_fused",
    ),
    "separator that is measured without fused smoothing": (
        [*JOB, *MEASURED, "--anti_method", "m4", "--anti_fused"],
        "--anti_fused has no meaning for --timestep_sep auto",
    ),
    "separator that is measured for true extremes": (
        [*JOB, *MEASURED, "--act_method", "mse"],
        "--act_method has no meaning for --timestep_sep auto",
    ),
    "separator that is measured for the better ranges": (
        [*JOB, *MEASURED, "--numerics", "reference"],
        "--numerics has no meaning for --timestep_sep auto",
    ),
    "one of several processors": ([*JOB, "--device_id", "1"], "--device_id 1 has no meaning"),
    "threshold without an evaluation": ([*JOB, "--min_psnr", "30"], "--min_psnr has no meaning without --evaluate"),
    "evaluation without a checkpoint": (
        [*without("--do_quant"), "--do_save_img", "--evaluate", "4"],
        "--evaluate 4 has no meaning without --do_quant",
    ),
    "threshold of pictures without pictures": (
        [*JOB, "--evaluate", "0", "--max_flip", "0.1"],
        "--evaluate 0 makes no pictures",
    ),
    "prompts without pictures": (
        [*JOB, "--evaluate", "0", "--evaluate_prompts", "p.txt"],
        "--evaluate 0 makes no pictures",
    ),
    "fewer pictures than none": ([*JOB, "--evaluate", "-1"], "--evaluate cannot be '-1'"),
    "part of prompts that does not exist": ([*JOB, "--data_split_id", "1"], "data_split_id 1 must be below"),
    "hang timeout of nothing": ([*JOB, "--hang_timeout", "0"], "--hang_timeout cannot be '0'"),
    "configuration that is missing": ([*JOB, "--config", "no.yaml"], "there is no file and no recipe 'no.yaml'"),
}
# Configuration files, by their content.
FILES = {
    "configuration that is no YAML": ("a: [b", "the configuration is not YAML"),
    "configuration that is a list": ("- a", "is a list, not a mapping"),
    "costs that are one number": ("quantization: {scheme_costs: 5}", "--scheme_costs cannot be 5"),
    "configuration with an unknown key": ("ranks: {tp: 2}", "no option is called 'tp'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_command_line_is_refused_with_its_own_message(name: str) -> None:
    words, message = CASES[name]
    assert_refused(words, message)


def test_the_cost_to_try_is_one_of_the_scheme_that_was_typed() -> None:
    error = refusal([*JOB, "--quant_type", "auto", "--scheme_costs", "w8a8=abc"])
    assert "'w8a8=abc' is no number" in error.what
    parse([*JOB, "--quant_type", "auto", "--scheme_costs", error.advice])
    assert error.advice.startswith("w8a8=")


def test_without_pictures_only_what_needs_them_is_named() -> None:
    words = [*JOB, "--evaluate", "0", "--min_layer_sqnr", "20"]
    assert refusal([*words, "--evaluate_prompts", "p.txt"]).where == "--evaluate, --evaluate_prompts"
    both = refusal([*words, "--max_flip", "0.1", "--evaluate_prompts", "p.txt"])
    assert both.where == "--evaluate, --max_flip, --evaluate_prompts"


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_configuration_file_is_refused_with_its_own_message(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / "job.yaml").write_text(content)
    assert_refused([*JOB, "--config", str(tmp_path / "job.yaml")], message)


def assert_refused(words: list[str], message: str) -> None:
    """Check that the words are refused in those words, with a place and an advice."""
    error = refusal(words)
    assert message in error.what
    assert error.where
    assert error.advice
    assert "Undefined" not in str(error)


def refusal(words: list[str]) -> ConfigurationError:
    """Return the error that the words are refused with."""
    with pytest.raises(ConfigurationError) as caught:
        parse(words)
    return caught.value
