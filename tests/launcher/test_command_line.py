"""Flags, YAML and defaults become one configuration; mistakes become sentences."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.cli.commands import commands
from launcher.cli.commands.merge import MergeOptions
from launcher.config.job_config import JobConfig
from launcher.config.option_flags import flags_of
from model_adapters import adapter_names, load_adapter
from quant_core.errors import ConfigurationError
from quant_core.schemes import QUANT_TYPES

FLUX = ["flux", "--path", "model", "--do_save_img"]  # the shortest command that has something to do


def job_of(*words: str) -> JobConfig:
    options = parse(words).options
    assert isinstance(options, JobConfig)
    return options


def refusal(*words: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        parse(words)
    return caught.value


def test_the_documented_flux_command_becomes_a_configuration() -> None:
    job = job_of(
        *("flux", "--path", "FLUX.1-dev", "--save_path", "./results/quant/img", "--device_id", "0", "--device", "npu"),
        *("--prompt_path", "prompts.txt", "--width", "1024", "--height", "1024", "--infer_steps", "50", "--seed", "42"),
        *("--use_cache", "--device_type", "A2-64g", "--batch_size", "1", "--max_num_prompt", "0", "--do_quant"),
        *("--quant_weight_save_folder", "./results/quant/safetensors"),
        *("--quant_dump_calib_folder", "./results/quant/cache"),
        *("--quant_type", "w8a8_dynamic", "--anti_method", "m4"),
    )
    assert job.pipeline.path == "FLUX.1-dev"
    assert job.quantization.quant_type == "w8a8_dynamic"
    assert job.quantization.anti_method == "m4"
    assert job.output.quant_dump_calib_folder == Path("results/quant/cache")


def test_the_documented_sd3_command_becomes_a_configuration() -> None:
    job = job_of(
        *("sd3", "--sd3_model_path", "sd3-medium", "--prompt_path", "prompts.txt", "--width", "1024"),
        *("--height", "1024", "--infer_steps", "28", "--seed", "42", "--device", "npu", "--do_quant"),
        *("--save_path", "./results/quant/images", "--quant_weight_save_folder", "w"),
        *("--quant_dump_calib_folder", "c", "--quant_type", "w8a8"),
    )
    assert job.pipeline.path == "sd3-medium"
    assert job.quantization.do_quant


def test_a_list_flag_takes_values_after_each_other_and_again() -> None:
    job = job_of(*FLUX, "--disable_names", "a.*", "b", "--disable_names", "c")
    assert job.quantization.disable_names == ("a.*", "b", "c")


def test_a_list_flag_without_values_is_the_empty_list_and_not_the_recipe() -> None:
    assert job_of(*FLUX, "--disable_names").quantization.disable_names == ()
    assert job_of(*FLUX).quantization.disable_names is None


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: flux\npipeline: {path: from-yaml, width: 64, height: 64}\noutput: {do_save_img: true}\n")
    job = job_of("flux", "--config", str(file), "--width", "128")
    assert (job.pipeline.width, job.pipeline.height, job.pipeline.path) == (128, 64, "from-yaml")
    assert job.pipeline.seed == 42  # the default


def test_a_stored_configuration_runs_the_same_job_again(tmp_path: Path) -> None:
    job = job_of(*FLUX, "--disable_names", "x", "--tp_size", "2", "--timeout_s", "60")
    file = tmp_path / "job.yaml"
    file.write_text(job.to_yaml())
    assert job_of("flux", "--config", str(file)) == job


def test_a_flag_replaces_what_yaml_says_under_the_other_name_of_the_same_option(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("pipeline: {sd3_model_path: old}\noutput: {do_save_img: true}\nranks:\n")
    assert job_of("sd3", "--config", str(file), "--sd3_model_path", "new").pipeline.path == "new"


def test_the_help_shows_what_to_type_on_a_first_day_and_all_of_it_is_understood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = capsys.readouterr().out
    examples = [command.example for command in commands().values() if command.example]
    assert len(examples) == 5
    for example in examples:
        assert example in told
        parse(example.partition("-m launcher ")[2].split())


@pytest.mark.parametrize(
    ("words", "what", "advice"),
    [
        ([], "the command is missing", "--help"),
        (["--device", "cpu"], "the command is missing", "--help"),
        (["plan"], "'plan' of which model?", "plan flux --help"),
        (["plan", "--help"], "'plan' of which model?", "plan flux --help"),
        (["plan", "flxu"], "no model is called 'flxu'", "flux (nearest name)"),
        (["flxu"], "no command is called 'flxu'", "flux"),
        ([*FLUX, "--widht", "64"], "no flag is called '--widht'", "--width"),
        ([*FLUX, "--widht=64"], "no flag is called '--widht'", "--width"),
        ([*FLUX, "--confg", "x"], "no flag is called '--confg'", "--config"),
        (["sd3", "--path", "x"], "no flag is called '--path'", "--sd3_model_path"),
        ([*FLUX, "stray"], "'stray' belongs to no flag", "--help"),
        ([*FLUX, "--width"], "--width: expected one argument", "--help"),
        ([*FLUX, "--wid", "64"], "no flag is called '--wid'", "--width"),
        (["flux", "--do_save_img"], "--path is missing", "--path TEXT"),
        ([*FLUX, "--width", "big"], "--width cannot be 'big'", "1024"),
        ([*FLUX, "--device", "tpu"], "--device cannot be 'tpu'", "npu"),
        (["flux", "--path", "m"], "this run would produce nothing", "--do_quant"),
        (["merge"], "--quant_weight_save_folder is missing", "FOLDER, or --quant_weight_save_folder PATH"),
        (["merge", "a", "b"], "'b' belongs to no flag", "--help"),
        (["merge", "a", "--quant_weight_save_folder", "b"], "FOLDER and --quant_weight_save_folder are two", "--help"),
        (["merge", "--quant_typ", "w8a8"], "no flag is called '--quant_typ'", "--quant_type"),
        ([*FLUX, "--config", "no/such.yaml"], "there is no file and no recipe 'no/such.yaml'", "existing"),
        ([*FLUX, "--config", "tests"], "cannot read 'tests'", "existing"),
        ([*FLUX, "--config", "qualty"], "there is no file and no recipe 'qualty'", "quality"),
        ([*FLUX, "--write_config", "/proc/job.yaml"], "cannot write '/proc/job.yaml'", "another file"),
    ],
)
def test_a_wrong_command_line_gets_four_lines_with_what_to_type(words: list[str], what: str, advice: str) -> None:
    error = refusal(*words)
    assert error.what.startswith(what)
    assert advice in error.advice
    assert len(str(error).splitlines()) == 4


def test_nothing_reaches_the_terminal_when_a_command_line_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    refusal(*FLUX, "--width")
    assert capfd.readouterr() == ("", "")


def test_a_value_from_yaml_is_located_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("pipeline: {path: m, width: 7}\noutput: {do_save_img: true}\n")
    assert refusal("flux", "--config", str(file)).where == f"--width, or pipeline.width in {file}"
    assert refusal("flux", "--config", str(file), "--width", "9").where == "--width"


@pytest.mark.parametrize(
    ("text", "what", "advice"),
    [
        ("quantization: {quant_typ: w8a8}", "no option is called 'quant_typ'", "quant_type"),
        ("quantisation: {}", "no option is called 'quantisation'", "quantization"),
        ("output: 5", "the section output cannot be 5", "save_path"),
        ("model: sd3", "' configures sd3, not flux", "python -m launcher sd3"),
        ("quantization: [", "the configuration is not YAML", "line"),
    ],
)
def test_a_wrong_file_gets_four_lines_naming_it(tmp_path: Path, text: str, what: str, advice: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    error = refusal("flux", "--path", "m", "--config", str(file))
    assert what in error.what
    assert advice in error.advice
    assert str(file) in str(error)
    assert len(str(error).splitlines()) == 4


def test_the_configuration_of_another_model_leads_to_the_same_command_of_that_model(tmp_path: Path) -> None:
    (file := tmp_path / "job.yaml").write_text("model: sd3")
    assert refusal("plan", "flux", "--config", str(file)).advice == f"python -m launcher plan sd3 --config {file}"
    assert refusal("flux", "--config", str(file)).advice == f"python -m launcher sd3 --config {file}"


def test_all_unknown_flags_are_told() -> None:
    error = refusal(*FLUX, "--widht", "64", "--do_quan")
    assert "--width (nearest name)" in str(error)
    assert "--do_quant (nearest name)" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        ["--quant_weight_save_folder", "w", "--quant_type", "w8a8"],  # the name that the folder has in a job
        ["w", "--quant_type", "w8a8"],
        ["--quant_type", "w8a8", "w"],
    ],
)
def test_merge_takes_the_folder_with_its_flag_or_without(words: list[str]) -> None:
    assert parse(["merge", *words]).options == MergeOptions(folder=Path("w"), quant_type="w8a8")


@pytest.mark.parametrize("command", commands())
def test_help_names_every_flag_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in flags_of(commands()[command].options()):
        assert flag.option in text
        assert not flag.is_positional or flag.word in text


def test_help_without_a_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and command.summary in text for name, command in commands().items())


@pytest.mark.parametrize("words", [["--help"], ["flux", "--help"], ["merge", "--help"], ["merge", "folder"], FLUX])
def test_reading_a_command_line_imports_neither_torch_nor_diffusers(words: list[str]) -> None:
    program = (
        "import sys, json; from launcher.cli.command_line import parse\n"
        f"try: parse({words!r})\nexcept SystemExit: pass\n"
        "print(json.dumps([name for name in ('torch', 'diffusers', 'transformers', 'yaml') if name in sys.modules]))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout.splitlines()[-1]) == []


def processor_seconds(program: str) -> float:
    """Return what a program costs: unlike its duration, this hardly depends on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_little_more_than_importing_pydantic() -> None:
    """Pydantic alone takes 0.075 s and the help 0.15 s on a quiet machine; with torch it would be over 20 times."""
    helps = "from launcher.cli.command_line import parse; parse(['flux', '--help'])"
    pydantic = "from pydantic import BaseModel"
    ratio = min(processor_seconds(helps) for _ in range(3)) / min(processor_seconds(pydantic) for _ in range(3))
    assert ratio < 4  # twice what was measured


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("model", adapter_names())
def test_every_scheme_is_a_choice_of_every_model(model: str, quant_type: str) -> None:
    path = "--sd3_model_path" if model == "sd3" else "--path"
    words = [model, path, "model", "--do_save_img", "--quant_type", quant_type]
    assert job_of(*words).quantization.quant_type == quant_type
    assert set(load_adapter(model).disabled_layers) == set(QUANT_TYPES)
    ranges = [*words, "--act_method", "mse"]
    if QUANT_TYPES[quant_type].scheme.observes_input:
        assert job_of(*ranges).quantization.act_method == "mse"
    else:
        assert f"--act_method mse has no meaning for {quant_type}" in str(refusal(*ranges))


def test_smoothing_that_the_runtime_of_a_scheme_ignores_is_refused_with_the_flag_that_helps() -> None:
    words = [*FLUX, "--quant_type", "w8a16", "--anti_method", "m4"]
    told = str(refusal(*words))
    assert "w8a16 can only be smoothed with --anti_fused" in told
    assert "--anti_method, --quant_type" in told
    assert job_of(*words, "--anti_fused").quantization.anti_fused
