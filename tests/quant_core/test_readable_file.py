"""A file that cannot be opened is not called damaged, by any of those who read files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant_core.calibration.safe_load import safe_torch_load
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.tensor_parts import open_safetensors
from quant_core.errors import InputError

READERS = [safe_torch_load, read_object, open_safetensors]
NOBODY = 65534
Reader = Callable[[Path], object]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A file that this user may not read, and whose folder this user may not enter."""
    file = tmp_path / "closed" / "file"
    file.parent.mkdir()
    file.touch(mode=0)
    file.parent.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    yield file
    if is_root:
        os.seteuid(0)
    file.parent.chmod(0o700)


@pytest.mark.parametrize("read", READERS)
def test_a_file_of_somebody_else_is_to_be_made_readable_and_not_removed(read: Reader, locked: Path):
    with pytest.raises(InputError, match="cannot be opened") as caught:
        read(locked)
    assert (caught.value.where, caught.value.why) == (str(locked), "Permission denied")
    assert "remove" not in caught.value.advice
    assert "owner and mode" in caught.value.advice


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["nothing", "file/below"])
def test_a_file_that_is_not_there_is_said_to_be_missing(read: Reader, name: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / name)


@pytest.mark.parametrize("read", READERS)
def test_a_folder_or_a_pipe_is_no_file_and_nobody_waits_for_it(read: Reader, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not a regular file"):
            read(path)
