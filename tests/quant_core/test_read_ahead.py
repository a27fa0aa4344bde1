"""One step is read ahead, no more, and what reading raises is raised where the step is asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from quant_core.session.read_ahead import read_ahead

STEPS = [["a", "b"], ["c"], ["d"], ["e"]]


def test_each_step_comes_whole_and_in_order_and_the_one_behind_it_is_read_meanwhile():
    began = {name: threading.Event() for name in "abcde"}

    def read(name: str) -> torch.Tensor:
        began[name].set()
        return torch.tensor(ord(name))

    with read_ahead(read, STEPS) as ahead:
        found = [next(ahead)]
        assert began["c"].wait(10), "the next step is read while this one is worked on"
        assert not began["d"].wait(0.2), "the one behind it is not"
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


def test_nothing_to_read_is_no_step():
    with read_ahead({}.__getitem__, []) as ahead:
        assert list(ahead) == []
