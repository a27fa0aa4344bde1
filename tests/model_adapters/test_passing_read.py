"""What was read in passing leaves the page cache some time later, and what was read last stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_adapters.weights import passing_read
from model_adapters.weights.passing_read import PassingRead
from tests.support.page_cache import cached_bytes, require_pages_that_leave

PIECE, PIECES = 1 << 20, 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is on the disk: pages that are not yet written cannot leave."""
    require_pages_that_leave(tmp_path)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(PIECE) * PIECES)
    with path.open("rb+") as written:
        os.fsync(written.fileno())
    return path


@pytest.fixture(autouse=True)
def little_memory(monkeypatch) -> None:
    monkeypatch.setattr(passing_read, "_LAG_BYTES", 4 * PIECE)
    monkeypatch.setattr(passing_read, "_STRETCH_BYTES", 2 * PIECE)


def read(path: Path, passing: PassingRead, start: int, stop: int) -> None:
    with path.open("rb") as file:
        assert len(os.pread(file.fileno(), stop - start, start)) == stop - start
    passing.note(path, start, stop)


def test_what_was_read_some_time_ago_is_given_up_and_the_last_is_kept(file: Path):
    passing = PassingRead()
    for number in range(PIECES):
        read(file, passing, number * PIECE, (number + 1) * PIECE)
    assert cached_bytes(file, 0, (PIECES - 8) * PIECE) == 0
    assert cached_bytes(file, (PIECES - 4) * PIECE, PIECES * PIECE) == 4 * PIECE


def test_what_nobody_read_is_left_alone(file: Path):
    passing, half = PassingRead(), PIECES // 2 * PIECE
    for start in range(0, half, PIECE):
        read(file, passing, start, start + PIECE)
    assert cached_bytes(file, half, PIECES * PIECE) == PIECES * PIECE - half


def test_a_file_that_has_gone_meanwhile_fails_nobody(file: Path):
    passing = PassingRead()
    for number in range(PIECES // 2):
        read(file, passing, number * PIECE, (number + 1) * PIECE)
    elsewhere, last = file.rename(file.with_name("elsewhere")), PIECES // 2 * PIECE
    for _ in range(2):
        passing.note(file, 0, 5 * PIECE)
    assert cached_bytes(elsewhere, last - PIECE, last) == PIECE  # it was to be given up, and could not be found


def test_a_reader_that_gives_nothing_up_would_be_found_out(file: Path):
    file.read_bytes()
    assert cached_bytes(file, 0, PIECES * PIECE) == PIECES * PIECE
