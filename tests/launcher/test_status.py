"""`status.json` is of the job that works in the folder, also while another one is refused there."""

from __future__ import annotations

import os
import time
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


def test_a_job_that_says_nothing_any_more_or_has_ended_keeps_no_status(folder: Path):
    past = time.time() - 60
    os.utime(folder / STATUS, (past, past))
    assert not is_kept(folder, "second")
    write_end(folder, time.time(), FAILED)
    assert not is_kept(folder, "second")
    write_end(folder, time.time(), REFUSED)
    assert (read_status(folder) or {})["exit_code"] == 6
