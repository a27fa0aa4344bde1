"""What a rank writes for its starter is what torchrun prints and what the supervisor reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launcher.failure.error_file import read_error_files, write_error_file
from launcher.failure.exit_codes import ExitCode
from launcher.failure.record import Failure
from quant_core.errors import InputError

ERROR = InputError("weights are truncated", where="rank 1, load: w.safetensors", why="8 bytes miss", advice="copy it")


@pytest.fixture
def failure() -> Failure:
    return Failure.of(ERROR, rank=1)


def write(folder: Path, attempt: int, rank: int, failure: Failure, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a rank's file where torchrun's agent places it."""
    path = folder / "job" / f"attempt_{attempt}" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    write_error_file(failure, is_first=rank == failure.rank)
    return path


def test_torchruns_summary_shows_the_four_lines_of_the_first_rank(tmp_path: Path, failure, monkeypatch) -> None:
    paths = {rank: write(tmp_path, 0, rank, failure, monkeypatch) for rank in (0, 1)}
    ended = {rank: ProcessFailure(rank, 4000 + rank, 4, str(path)) for rank, path in paths.items()}
    summary = ChildFailedError("launcher", ended)
    assert summary.get_first_failure()[0] == 1
    root_cause = str(summary).split("Root Cause")[1]
    assert str(ERROR).replace("\n", "\n  ") in root_cause
    assert "left because rank 1 failed: weights are truncated" in str(summary)


def test_the_supervisor_reads_the_kind_from_the_last_attempt(tmp_path: Path, failure, monkeypatch) -> None:
    write(tmp_path, 0, 0, Failure.of(ZeroDivisionError(), 0), monkeypatch)
    write(tmp_path, 1, 1, failure, monkeypatch)
    assert read_error_files(tmp_path) == [failure]
    assert failure.exit_code is ExitCode.INPUT
    assert str(failure.error()) == str(ERROR)


def test_a_last_attempt_that_was_killed_wrote_nothing_and_an_earlier_one_does_not_speak_for_it(
    tmp_path: Path, failure, monkeypatch
) -> None:
    write(tmp_path, 0, 1, failure, monkeypatch)
    (tmp_path / "job" / "attempt_1" / "1").mkdir(parents=True)  # the agent's, before it starts a rank
    assert read_error_files(tmp_path) == []


def test_a_file_of_another_program_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "attempt_0" / "0" / "error.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"message": "a traceback"}')
    assert read_error_files(tmp_path) == []


def test_without_a_starter_nothing_is_written(failure, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    write_error_file(failure, is_first=True)
    assert list(tmp_path.iterdir()) == []
