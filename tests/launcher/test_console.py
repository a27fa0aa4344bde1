"""One rank speaks, in lines that a log file can bear."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

import pytest

from launcher.failure.way_out import tell
from launcher.journal import console as module
from launcher.journal.console import Console, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Console(speaks=False, live=False)
    silent.say("hello")
    silent.progress("calibrate", 1, 1)
    assert capsys.readouterr().out == ""


def test_plain_lines_come_seldom_and_at_the_end_of_a_stage(clock: list[float], capsys) -> None:
    console = Console(speaks=True, interval_s=5.0, live=False)
    for done in range(11):  # a record a second: lines at 0, 5 and 10
        console.progress("quantize", done, 10)
        clock[0] += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["quantize: 0/10", "quantize: 5/10", "quantize: 10/10"]
    assert lines[1] == "quantize: 5/10 (5 s left)"


def test_the_time_left_does_not_count_what_an_earlier_run_did(clock: list[float], capsys) -> None:
    console = Console(speaks=True, interval_s=5.0, live=False, note=lambda: "slowest rank 1")
    console.progress("calibrate", 8, 12)
    clock[0] += 10.0
    console.progress("calibrate", 9, 12)
    assert capsys.readouterr().out.splitlines()[-1] == "calibrate: 9/12 (30 s left, slowest rank 1)"


@pytest.mark.parametrize(
    "speak",
    [
        lambda: Console(speaks=True, live=False).say("a line"),
        lambda: Console(speaks=True, live=False).progress("calibrate", 1, 1),
        lambda: tell("error: this failed\n  where  rank 0"),
    ],
    ids=["line", "progress", "failure"],
)
def test_what_a_rank_says_is_one_write_even_unbuffered(
    speak: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    readable, writable = os.pipe2(os.O_DIRECT)  # a read returns one write
    with open(readable, "rb", buffering=0) as reader, open(writable, "wb", buffering=0) as pipe:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(pipe, write_through=True))
        speak()
        assert reader.read(4096).endswith(b"\n")


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (700, "12 min"), (3900, "1 h 05 min")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
