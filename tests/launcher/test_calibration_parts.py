"""A dump that was made in several runs has the bytes of one that was made in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.files.calibration_parts import CalibrationParts, load_sound_dump
from quant_core.calibration.records import load_dump
from quant_core.errors import InputError

HEADER = {"fingerprint": "mine", "rank": 0}
BATCHES, STEPS = 3, 2


def records(batch: int) -> list[dict[str, Any]]:
    """Records as a pipeline makes them: embeddings shared within a batch, ids shared by all, texts made anew."""
    embeddings, ids = torch.full((4, 8), float(batch)), torch.arange(6)
    return [
        {
            "tag": "",
            "timestep_idx": step,
            "module_name": f"Model{''}.forward",
            "args": [],
            "kwargs": {
                "x": torch.full((2, 3), batch + step / 10),
                "embeddings": embeddings,
                "ids": [ids.clone(), None],
            },
        }
        for step in range(STEPS)
    ]


def dump_in_runs(folder: Path, *runs: range) -> Path:
    """Save the batches of each run with a fresh object, as a restarted process has, and assemble in the last."""
    dump = folder / "calib_data.pth"
    for batches in runs:
        parts = CalibrationParts.beside(dump, "mine")
        assert parts.finished() == batches.start
        for batch in batches:
            parts.save(batch, records(batch))
    assert CalibrationParts.beside(dump, "mine").assemble(dump, BATCHES, HEADER) == BATCHES * STEPS
    return dump


def test_a_dump_in_two_runs_has_the_bytes_of_one_in_one_run(tmp_path: Path) -> None:
    whole = dump_in_runs(tmp_path / "whole", range(BATCHES))
    resumed = dump_in_runs(tmp_path / "resumed", range(2), range(2, BATCHES))
    assert whole.read_bytes() == resumed.read_bytes()


def test_each_distinct_tensor_stands_once_across_batches(tmp_path: Path) -> None:
    found = load_dump(dump_in_runs(tmp_path, range(1), range(1, BATCHES)))["records"]
    ids = {record["kwargs"]["ids"][0].untyped_storage().data_ptr() for record in found}
    embeddings = {record["kwargs"]["embeddings"].untyped_storage().data_ptr() for record in found}
    assert (len(ids), len(embeddings)) == (1, BATCHES)
    assert [record["timestep_idx"] for record in found] == list(range(STEPS)) * BATCHES


def test_the_parts_are_gone_when_the_dump_is_there(tmp_path: Path) -> None:
    dump = dump_in_runs(tmp_path, range(BATCHES))
    assert CalibrationParts.beside(dump, "mine").finished() == 0
    assert [path.name for path in (tmp_path).rglob("*.pth")] == ["calib_data.pth"]


def test_parts_of_another_job_and_after_a_damaged_one_do_not_count(tmp_path: Path) -> None:
    dump = tmp_path / "calib_data.pth"
    parts = CalibrationParts.beside(dump, "mine")
    saved = [parts.save(batch, records(batch)) for batch in range(BATCHES)]
    assert parts.finished() == BATCHES
    assert CalibrationParts.beside(dump, "another").finished() == 0
    saved[1].write_bytes(saved[1].read_bytes()[:100])
    assert parts.finished() == 1


def test_a_part_that_is_missing_at_the_end_is_an_error_and_no_dump_appears(tmp_path: Path) -> None:
    dump = tmp_path / "calib_data.pth"
    parts = CalibrationParts.beside(dump, "mine")
    parts.save(0, records(0))
    with pytest.raises(InputError, match="no such file"):
        parts.assemble(dump, 2, HEADER)
    assert not dump.exists()


def flip_a_byte_of_a_tensor(path: Path) -> None:
    """Change one bit of the embeddings, which are 1.0 in batch 1: the file stays readable."""
    content = path.read_bytes()
    place = content.index(torch.full((4, 8), 1.0).numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    load_dump(path)


def test_a_changed_byte_in_a_dump_is_noticed(tmp_path: Path) -> None:
    dump = dump_in_runs(tmp_path, range(BATCHES))
    assert len(load_sound_dump(dump)["records"]) == BATCHES * STEPS
    flip_a_byte_of_a_tensor(dump)
    with pytest.raises(InputError, match="changed after it was saved"):
        load_sound_dump(dump)


def test_a_batch_with_a_changed_byte_is_run_again(tmp_path: Path) -> None:
    parts = CalibrationParts.beside(tmp_path / "calib_data.pth", "mine")
    saved = [parts.save(batch, records(batch)) for batch in range(BATCHES)]
    flip_a_byte_of_a_tensor(saved[1])
    assert parts.finished() == 1


def test_batches_of_another_job_are_not_assembled(tmp_path: Path) -> None:
    dump = tmp_path / "calib_data.pth"
    for batch in range(BATCHES):
        CalibrationParts.beside(dump, "another" if batch == 1 else "mine").save(batch, records(batch))
    with pytest.raises(InputError, match="is another job's"):
        CalibrationParts.beside(dump, "mine").assemble(dump, BATCHES, HEADER)
    assert not dump.exists()
