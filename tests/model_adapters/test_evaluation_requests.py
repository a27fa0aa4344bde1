"""What is evaluated was not calibrated, and a card says under which options."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_adapters import load_adapter, load_options
from model_adapters.options import PipelineOptions
from model_adapters.pipeline.prompts import read_batches
from model_adapters.quality.origin import origin_of
from model_adapters.quality.requests import evaluation_batches
from quant_core.errors import InputError


def prompt_file(path: Path, count: int) -> Path:
    path.write_text("".join(f"prompt {number} of {path.stem}\n" for number in range(count)))
    path.chmod(0o640)
    return path


def options(tmp_path: Path, count: int = 5, **changes: object) -> PipelineOptions:
    path = prompt_file(tmp_path / "own.txt", count)
    return load_options("flux").OPTIONS(path="/model", prompt_path=str(path), **changes)


def flat(batches: list) -> list:
    return [request for batch in batches for request in batch]


def test_prompts_that_were_left_out_come_first_and_then_the_others_as_further_copies(tmp_path: Path):
    found = flat(evaluation_batches(options(tmp_path, max_num_prompt=3), 4))
    assert [(request.prompt_number, request.copy, request.number) for request in found] == [
        (3, 0, 3),
        (4, 0, 4),
        (0, 1, 5),
        (1, 1, 6),
    ]


def test_of_a_divided_file_the_prompts_of_the_other_parts_come_first(tmp_path: Path):
    job = options(tmp_path, count=3, data_split_num=3, data_split_id=1)
    found = flat(evaluation_batches(job, 4))
    assert [(request.prompt_number, request.copy, request.number) for request in found] == [
        (0, 1, 3),
        (2, 1, 4),
        (1, 1, 5),
        (0, 2, 6),
    ]


@pytest.mark.parametrize("changes", [{}, {"max_num_prompt": 3}, {"num_images_per_prompt": 2}, {"max_num_prompt": 9}])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_noise_and_files_are_never_those_of_the_calibration(tmp_path: Path, changes: dict[str, int], count: int):
    job = options(tmp_path, **changes)
    calibrated, evaluated = flat(read_batches(job)), flat(evaluation_batches(job, count))
    assert len(evaluated) == count
    numbers = [request.number for request in [*calibrated, *evaluated]]
    assert len(set(numbers)) == len(numbers)
    stems = [request.file_stem for request in evaluated]
    assert len(set(stems)) == count
    assert not set(stems) & {request.file_stem for request in calibrated}


def test_a_job_that_had_no_prompts_is_evaluated_on_those_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    without = load_options("flux").OPTIONS(path="/model")
    found = flat(evaluation_batches(without, 2, prompt_file(tmp_path / "other.txt", 1)))
    assert [(request.number, request.file_stem) for request in found] == [(0, "0_0"), (1, "0_1")]
    with pytest.raises(InputError, match="no such prompt file"):
        evaluation_batches(without, 2)


def test_a_file_of_its_own_gives_the_prompts(tmp_path: Path):
    found = flat(evaluation_batches(options(tmp_path), 3, prompt_file(tmp_path / "other.txt", 2)))
    assert [request.prompt for request in found] == ["prompt 0 of other", "prompt 1 of other", "prompt 0 of other"]
    assert [request.number for request in found] == [5, 6, 7]
    assert [request.file_stem for request in found] == ["0_0", "1_0", "0_1"]


def test_batches_are_those_of_the_whole_job(tmp_path: Path):
    assert [len(batch) for batch in evaluation_batches(options(tmp_path, batch_size=2), 5)] == [2, 2, 1]
    assert evaluation_batches(options(tmp_path), 0) == []


def test_a_card_says_what_its_pictures_depend_on_and_no_path(tmp_path: Path):
    job = options(tmp_path, infer_steps=4, width=512)
    origin = origin_of(load_adapter("flux"), job, quant_type="W8A8", fingerprint="abc", checkpoint="def")
    assert (origin.options["infer_steps"], origin.options["width"], origin.options["seed"]) == (4, 512, 42)
    assert (origin.dtype, origin.floor_dtype) == ("bfloat16", "float32")
    assert set(origin.versions) >= {"torch", "diffusers"}
    assert str(tmp_path) not in origin.model_dump_json()
    assert "/model" not in origin.model_dump_json()
