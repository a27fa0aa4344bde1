"""A dump is complete, plain data, or refused by name; every accepted form of calibration data becomes records."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import safe_torch_load
from quant_core.calibration.records import FORMAT, VERSION, Record, as_records, load_dump, save_dump
from quant_core.errors import InputError

STEP_RECORD = {"tag": "", "timestep_idx": 3, "module_name": "M.forward", "args": [], "kwargs": {"x": torch.ones(2)}}


def test_a_dump_reads_back_with_its_header_and_records(tmp_path: Path):
    path = save_dump(tmp_path / "calib.pth", [STEP_RECORD, [torch.zeros(1), None, 2.5]], {"prompts": ["a", "b"]})
    dump = load_dump(path)
    assert (dump["format"], dump["version"], dump["header"]) == (FORMAT, VERSION, {"prompts": ["a", "b"]})
    first, second = as_records(dump)
    assert first.step == 3
    assert torch.equal(first.kwargs["x"], torch.ones(2))
    assert (second.step, second.args[1:]) == (None, [None, 2.5])


def test_a_dump_is_loadable_with_weights_only_and_has_mode_0640(tmp_path: Path):
    path = save_dump(tmp_path / "calib.pth", [STEP_RECORD], {})
    assert torch.load(path, weights_only=True)["complete"] is True
    assert path.stat().st_mode & 0o777 == 0o640


def test_equal_tensors_stand_in_the_file_once(tmp_path: Path):
    shared = torch.zeros(100_000)  # 400 KB
    path = save_dump(tmp_path / "calib.pth", [[shared] for _ in range(10)], {})
    assert path.stat().st_size < 2 * shared.nbytes


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (None, []),
        ([], []),
        ([[1, 2]], [Record([1, 2])]),
        ([(1, 2)], [Record((1, 2))]),
        ([{"args": [1], "kwargs": {"y": 2}, "timestep_idx": 5}], [Record([1], {"y": 2}, 5)]),
        ([{"kwargs": {"y": 2}}], [Record((), {"y": 2}, None)]),
        ([{"args": None, "kwargs": None, "timestep_idx": None}], [Record((), {}, None)]),
        ([Record([1], {}, 2)], [Record([1], {}, 2)]),
    ],
)
def test_every_accepted_form_becomes_records_in_its_order(form: Any, expected: list[Record]):
    assert as_records(form) == expected


def test_a_call_that_is_written_as_args_and_as_kwargs_is_one_call():
    x, y = torch.ones(1), torch.zeros(1)
    twice = {"args": [x, y], "kwargs": {"x": x, "y": y}, "timestep_idx": 0}
    (record,) = as_records([{**twice, "module_name": "Model.forward"}])  # as the reference tool's records are
    assert record.args == ()
    assert list(record.kwargs) == ["x", "y"]
    # A record made by hand says what it says: one tensor may be given twice.
    (record,) = as_records([twice])
    assert len(record.args) == 2


def test_args_and_kwargs_of_different_tensors_are_both_kept():
    (record,) = as_records([{"args": [torch.ones(1)], "kwargs": {"y": torch.zeros(1)}, "timestep_idx": 0}])
    assert len(record.args) == len(record.kwargs) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (7, "calib_data is a int"),
        ("path.pth", "calib_data is a str"),
        (torch.ones(3), "calib_data is a Tensor"),
        ([[1], 7], "entry 1 is a int"),
        ([{"args": 7}], "entry 0 is a dict"),
        ([{"kwargs": [1]}], "entry 0 is a dict"),
        ([{"args": torch.ones(2)}], "entry 0 is a dict"),
        ([{"args": [], "timestep_idx": "3"}], "entry 0 is a dict"),
        ([{"args": [], "timestep_idx": -1}], "entry 0 is a dict"),
        ([{"args": [], "timestep_idx": 3.0}], "timestep_idx, a whole number or None"),
        ([{"timestep_idx": 3}], "entry 0 is a dict"),
        ([{"hidden_states": torch.ones(2)}], "entry 0 is a dict"),  # the keyword arguments themselves
        ({}, "it does not say that it is one"),
        ({"format": "other", "records": []}, "it does not say that it is one"),
        ({"format": FORMAT, "version": 99}, "its version is 99, this program reads version 1"),
        ({"format": FORMAT, "version": VERSION, "header": {}, "records": []}, "it was not finished"),
        ({"format": FORMAT, "version": VERSION, "header": {}, "records": {}, "complete": True}, "it was not finished"),
        ({"format": FORMAT, "version": VERSION, "records": [], "complete": True}, "it has no header"),
    ],
)
def test_what_is_no_calibration_data_is_refused_with_the_reason(data: Any, says: str):
    with pytest.raises(InputError) as caught:
        as_records(data)
    assert says in str(caught.value)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["error:", "where", "why", "try"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(2000))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [truncated, half, empty, noise, folder, pipe, Path.unlink])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_damaged_dump_is_an_input_error_that_names_it(tmp_path: Path, damage, mmap: bool):
    path = save_dump(tmp_path / "calib.pth", [STEP_RECORD], {})
    damage(path)
    with pytest.raises(InputError) as caught:
        load_dump(path, mmap=mmap)
    assert str(path) in str(caught.value)


class Evil:
    """Executes when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data, 2))])
def test_a_pickle_that_would_execute_is_refused_and_does_not(tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "calib.pth"
    save({"format": FORMAT, "records": [Evil()]}, path)
    with pytest.raises(InputError):
        safe_torch_load(path)
    assert not (tmp_path / "executed").exists()


def test_a_map_location_is_passed_on(tmp_path: Path):
    path = save_dump(tmp_path / "calib.pth", [[torch.ones(1)]], {})
    assert safe_torch_load(path, map_location="meta")["records"][0][0].is_meta
