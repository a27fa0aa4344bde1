"""The job beside a checkpoint is read from any folder, and moved together with what it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_from_yaml
from launcher.config.stored_job import read_stored
from launcher.report.running import option_rows
from quant_core.errors import InputError

WORDS = "--path model --prompt_path prompts.txt --lora a.safetensors:0.5 b.safetensors --transformer owner/name"


def started_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Return a job that was started in a folder, with what it reads."""
    (folder / "model").mkdir(parents=True)
    for name in ("prompts.txt", "a.safetensors", "b.safetensors"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    words = f"{WORDS} --do_quant --quant_weight_save_folder w --quant_dump_calib_folder c"
    return parse(["flux", *words.split()]).options


def test_relative_paths_are_those_of_the_folder_where_the_job_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = tmp_path / "there"
    job = started_in(there, monkeypatch)
    text = job.to_yaml()
    monkeypatch.chdir(tmp_path)
    found = job_from_yaml(text)
    assert found.pipeline.path == str(there / "model")
    assert found.pipeline.prompt_path == str(there / "prompts.txt")
    assert found.pipeline.lora == (f"{there}/a.safetensors:0.5", f"{there}/b.safetensors")
    assert found.pipeline.transformer == "owner/name"  # nothing of that name is there
    assert job_from_yaml(found.to_yaml()) == found


def test_what_was_moved_as_a_whole_is_found_from_its_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = started_in(tmp_path / "there", monkeypatch)
    text = job.to_yaml()
    (tmp_path / "there").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert job_from_yaml(text) == job


def test_a_stored_job_as_a_configuration_means_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = started_in(tmp_path / "there", monkeypatch)
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    monkeypatch.chdir(tmp_path)
    assert parse(["flux", "--config", "job.yaml"]).options == job


@pytest.mark.parametrize("text", ["", "pipeline: {path: m}\n"])
def test_a_job_that_names_no_model_is_a_damaged_file(text: str, tmp_path: Path):
    path = tmp_path / "quant_job.yaml"
    path.write_text(text)
    for read in (lambda: read_stored(path), lambda: option_rows(tmp_path)):
        with pytest.raises(InputError, match="not known") as caught:
            read()
        assert caught.value.where == str(path)
