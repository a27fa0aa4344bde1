"""Some steps are read ahead, no more, and what reading raises is raised where the step is asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from quant_core.session.read_ahead import AHEAD, read_ahead

STEPS = [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_each_step_comes_whole_and_in_order_and_those_behind_it_are_read_meanwhile():
    began = {name: threading.Event() for name in "abcdef"}

    def read(name: str) -> torch.Tensor:
        began[name].set()
        return torch.tensor(ord(name))

    with read_ahead(read, STEPS) as ahead:
        found = [next(ahead)]
        assert all(began[name].wait(10) for name in "cde"[:AHEAD]), "the next steps are read while this is worked on"
        assert not began["f"].wait(0.2), "the one behind them is not"
        found += ahead
    assert [list(step) for step in found] == STEPS
    assert found[0]["b"] == ord("b")


def test_an_error_keeps_its_kind_and_comes_with_its_step():
    def read(name: str) -> torch.Tensor:
        if name == "c":
            raise OSError("the disk is gone")
        return torch.zeros(1)

    with read_ahead(read, STEPS) as ahead:
        assert set(next(ahead)) == {"a", "b"}
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)


def test_what_was_not_begun_is_not_read_when_the_work_fails():
    begun: list[str] = []
    go_on = threading.Event()

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        if name == "c":
            assert go_on.wait(10)
        return torch.zeros(1)

    def work() -> None:
        with read_ahead(read, STEPS) as ahead:
            next(ahead)
            threading.Timer(0.1, go_on.set).start()
            raise ValueError("no layer")

    with pytest.raises(ValueError, match="no layer"):
        work()
    assert begun == ["a", "b", "c"]


def test_nothing_to_read_is_no_step():
    with read_ahead({}.__getitem__, []) as ahead:
        assert list(ahead) == []
