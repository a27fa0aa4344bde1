"""Some pieces are read ahead, no more than a number of bytes, and what reading raises comes with its piece."""

from __future__ import annotations

import threading

import pytest
import torch

from quant_core.session import read_ahead as module
from quant_core.session.read_ahead import Piece, read_ahead, row_pieces

PIECES = [Piece(name, size) for name, size in [("a", 1), ("b", 2), ("c", 1), ("d", 5), ("e", 9), ("f", 1)]]


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", 4)


class Read:
    """Read pieces of one number, the letter's; `began` tells of each whether it was asked for."""

    def __init__(self) -> None:
        self.began = {piece.name: threading.Event() for piece in PIECES}

    def __call__(self, name: str) -> torch.Tensor:
        self.began[name].set()
        return torch.tensor(ord(name))

    def has_begun(self, names: str) -> bool:
        return all(self.began[name].wait(10) for name in names)

    def rests_at(self, name: str) -> bool:
        return not self.began[name].wait(0.2)


def test_pieces_come_in_order_and_as_many_as_fit_are_read_meanwhile():
    read = Read()
    with read_ahead(read, PIECES) as ahead:
        found = [next(ahead)]
        assert read.has_begun("abc"), "4 bytes"
        assert read.rests_at("d")
        found.append(next(ahead))
        assert read.has_begun("d"), "2 of the 4 bytes are taken"
        assert read.rests_at("e")
        found += ahead
    assert [chr(letter) for letter in found] == [piece.name for piece in PIECES]


def test_the_next_piece_is_read_however_large_it_is():
    read = Read()
    with read_ahead(read, PIECES[3:]) as ahead:
        next(ahead)
        assert read.has_begun("de")
        assert read.rests_at("f")


def test_an_error_keeps_its_kind_and_comes_with_its_piece():
    def read(name: str) -> torch.Tensor:
        if name == "b":
            raise OSError("the disk is gone")
        return torch.zeros(1)

    with read_ahead(read, PIECES) as ahead:
        assert next(ahead) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)


def test_what_was_not_begun_is_not_read_when_the_work_fails():
    begun: list[str] = []
    go_on = threading.Event()

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        if name == "b":
            assert go_on.wait(10)
        return torch.zeros(1)

    def work() -> None:
        with read_ahead(read, PIECES) as ahead:
            next(ahead)
            threading.Timer(0.1, go_on.set).start()
            raise ValueError("no layer")

    with pytest.raises(ValueError, match="no layer"):
        work()
    assert begun == ["a", "b"]


def test_nothing_to_read_is_no_piece():
    with read_ahead({}.__getitem__, []) as ahead:
        assert list(ahead) == []


def test_the_pieces_of_a_matrix_are_all_of_its_rows_and_none_is_too_large(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 30)
    pieces = row_pieces("w", 10, row_bytes=8)
    assert [piece.rows for piece in pieces] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert [piece.size for piece in pieces] == [24, 24, 24, 8]
    assert [piece.rows for piece in row_pieces("w", 2, row_bytes=100)] == [slice(0, 1), slice(1, 2)]
    assert row_pieces("w", 3, row_bytes=10) == [Piece("w", 30)]
