"""Recipes come with the models, are what their names promise, and start a job from `--config NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.cli.commands.recipes import RecipesOptions, run
from launcher.config.job_config import JobConfig
from launcher.config.recipes import recipes
from model_adapters import adapter_names
from quant_core.errors import ConfigurationError
from tests.support.torchrun import ROOT

MODEL = {"flux": ("--path", "model"), "sd3": ("--sd3_model_path", "model")}
ALL = [(recipe.model, recipe.name) for recipe in recipes()]

_FLUX = (
    *("--save_path", "./results/quant/img", "--device_id", "0", "--device", "npu", "--width", "1024"),
    *("--height", "1024", "--infer_steps", "50", "--seed", "42", "--use_cache", "--device_type", "A2-64g"),
    *("--batch_size", "1", "--max_num_prompt", "0", "--do_quant"),
    *("--quant_weight_save_folder", "./results/quant/safetensors"),
    *("--quant_dump_calib_folder", "./results/quant/cache"),
)
# The commands of the reference tool's documents, but for the files of the machine they ran on.
PUBLISHED = {
    ("flux", "timestep"): (*_FLUX, "--quant_type", "w8a8_timestep"),
    ("flux", "fa3"): (*_FLUX, "--quant_type", "w8a8_dynamic_fa3"),
    ("flux", "outliers"): (*_FLUX, "--quant_type", "w8a8_dynamic", "--anti_method", "m4"),
    ("sd3", "w8a8"): (
        *("--width", "1024", "--height", "1024", "--infer_steps", "28", "--seed", "42", "--device", "npu"),
        *("--save_path", "./results/quant/images", "--do_quant"),
        *("--quant_weight_save_folder", "./results/quant/safetensors"),
        *("--quant_dump_calib_folder", "./results/quant/cache", "--quant_type", "w8a8"),
    ),
}


def job_of(model: str, *words: str) -> JobConfig:
    return parse([model, *MODEL[model], *words]).options


@pytest.mark.parametrize(("model", "name"), PUBLISHED)
def test_a_published_command_is_a_recipe(model: str, name: str):
    assert job_of(model, "--config", name) == job_of(model, *PUBLISHED[model, name])


@pytest.mark.parametrize(("model", "name"), ALL)
def test_every_recipe_needs_nothing_but_the_model_and_says_what_it_is_for(model: str, name: str):
    assert job_of(model, "--config", name).quantization.do_quant
    [recipe] = [each for each in recipes(model) if each.name == name]
    assert recipe.text.startswith("# ")
    assert recipe.summary.endswith(".")


@pytest.mark.parametrize(("model", "name"), ALL)
def test_a_recipe_has_the_figures_of_the_study(model: str, name: str):
    [recipe] = [each for each in recipes(model) if each.name == name]
    options, found = job_of(model, "--config", name).quantization, recipe.measured
    assert found is not None
    assert (ROOT / found.command.removeprefix("python ") / "__main__.py").is_file()
    assert (ROOT / found.model / "model_index.json").is_file()
    study = (ROOT / "scripts" / "study.md").read_text(encoding="utf-8").partition(f"\n## {model}\n")[2]
    table = [[cell.strip().split(" ")[0] for cell in line.split("|")[1:-1]] for line in study.splitlines()]
    method = [options.quant_type, options.anti_method or "none", "minmax", "float32"]
    row = next(row for row in table if row[:4] == method)
    assert [row[5], row[6], row[7]] == [str(each) for each in (found.worst_layer, found.output, found.pictures)]
    assert next(row for row in table if row[:1] == ["float;"])[7] == str(found.floor)


def test_every_model_has_the_plain_choice():
    for model in adapter_names():
        assert job_of(model, "--config", "quality").quantization.quant_type == "w8a8_dynamic"


def test_flags_win_over_a_recipe_and_a_file_of_the_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert job_of("flux", "--config", "fa3", "--quant_type", "w8a16").quantization.quant_type == "w8a16"
    monkeypatch.chdir(tmp_path)
    Path("fa3").write_text("output: {do_save_img: true}\n")
    assert not job_of("flux", "--config", "fa3").quantization.do_quant


def test_the_resolved_options_are_written_and_nothing_else_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        job_of("flux", "--config", "fa3", "--seed", "7", "--write_config", str(tmp_path / "job.yaml"))
    assert ended.value.code == 0
    assert "job.yaml" in capsys.readouterr().out
    assert parse(["flux", "--config", str(tmp_path / "job.yaml")]).options == job_of(
        "flux", "--config", "fa3", "--seed", "7"
    )


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]):
    run(RecipesOptions(), None)
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[::2]] == [f"{model}/{name}" for model, name in ALL]
    assert "output 28.2, worst layer 33.1, pictures 51.0 of at most 61.8 dB" in listed
    assert "pictures 53.2 of at most 61.8 dB, attention float (scripts/tiny_models/flux" in listed
    run(RecipesOptions(name="flux/fa3"), None)
    assert "quant_type: w8a8_dynamic_fa3" in capsys.readouterr().out
    run(RecipesOptions(name="quality"), None)
    assert capsys.readouterr().out.count("quant_type: ") == len(adapter_names())
    with pytest.raises(ConfigurationError) as caught:
        run(RecipesOptions(name="flux/qualty"), None)
    assert "flux/quality" in str(caught.value.advice)
