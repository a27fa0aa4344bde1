"""`status.json` is of the job that works in the folder, also while another one is refused there."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.failure.record import Failure, write_end
from launcher.journal.status import STATUS, is_kept, read_status, write_status
from quant_core.errors import FolderInUse, InputError

REFUSED = Failure.of(FolderInUse("another job works in this folder"), rank=0)
FAILED = Failure.of(InputError("the prompts cannot be read"), rank=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a job that runs."""
    write_status(tmp_path, "running", time.time(), run="first", ranks=[])
    return tmp_path


def test_a_job_that_is_refused_leaves_the_status_of_the_one_that_runs(folder: Path):
    assert is_kept(folder, "second")
    assert not is_kept(folder, "first")
    write_end(folder, time.time(), REFUSED)
    assert (read_status(folder) or {})["run"] == "first"
    write_end(folder, time.time(), FAILED)
    assert (read_status(folder) or {})["exit_code"] == 4


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Let no file get larger than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_a_status_that_says_how_the_job_ended(tmp_path: Path):
    shown = dict.fromkeys(("rank", "stage", "done", "total", "step", "memory", "host", "pid"), 0)
    write_status(tmp_path, "running", time.time(), run="0" * 32, ranks=[shown])
    long = Failure.of(InputError("prompts " * 500, where="a place " * 500), rank=0)
    with no_room_beyond((tmp_path / STATUS).stat().st_size):
        write_end(tmp_path, time.time(), long)
    told = read_status(tmp_path) or {}
    assert (told["state"], told["exit_code"]) == ("failed", 4)
    assert told["error"]["what"].startswith("prompts prompts")


def test_a_job_that_says_nothing_any_more_or_has_ended_keeps_no_status(folder: Path):
    past = time.time() - 60
    os.utime(folder / STATUS, (past, past))
    assert not is_kept(folder, "second")
    write_end(folder, time.time(), FAILED)
    assert not is_kept(folder, "second")
    write_end(folder, time.time(), REFUSED)
    assert (read_status(folder) or {})["exit_code"] == 6
