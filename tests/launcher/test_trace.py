"""Stages are timed and logged, and the logs of a run become a trace with a track for each rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.commands.trace import TraceOptions, run
from launcher.journal import logs, stages
from launcher.journal.stages import StageClock
from launcher.journal.trace import last_run, trace_events
from quant_core.errors import InputError

MB = 2**20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    return now


def test_the_end_of_a_stage_is_told_with_its_time_and_the_rank_that_held_most(clock: list[float]):
    stage = StageClock(rank=0)
    assert stage.turn("load", memory=100 * MB) is None
    stage.see(1, 3000 * MB)
    stage.see(1, 2000 * MB)
    clock[0] += 75
    assert stage.turn("quantize", memory=200 * MB) == "load took 75 s, at most 2.9 GiB on rank 1"
    clock[0] += 0.5
    assert stage.turn("merge", memory=200 * MB) is None  # a moment
    clock[0] += 60
    assert stage.turn("", memory=1024 * MB) == "merge took 60 s, at most 1.0 GiB"


def line(second: float, rank: int, run: str, **fields: object) -> str:
    told = {"time": f"2026-01-01T10:00:{second:06.3f}", "run": run, "rank": rank, "level": "info", "from": "launcher"}
    return json.dumps({**told, "text": "said", **fields})


def stage(second: float, rank: int, run: str, name: str, seconds: float) -> list[str]:
    """Return the two lines of a stage that ended at that second."""
    return [
        line(second - seconds, rank, run, stage=name),
        line(second, rank, run, ended=name, seconds=seconds, memory=MB),
    ]


def write_logs(folder: Path) -> Path:
    """Two runs of two ranks after one of three; in the last, rank 1 is slow and rank 0 waits for it.

    While it runs, another job wants the folder and is refused.
    """
    (folder / "logs").mkdir()
    for rank, working in ((0, 1.0), (1, 4.0), (2, 0.0)):
        lines = stage(0.5, rank, "first", "prepare", 0.5)
        if rank < 2:
            lines += [
                *stage(10, rank, "last", "fetch", 1.0),
                *stage(11, rank, "last", "prepare", 1.0),
                line(11, rank, "last", stage="quantize"),
                line(12, rank, "refused", stage="prepare"),
                line(13, rank, "refused", text="another job works in this folder"),
                line(15, rank, "last", wait="whether to merge", seconds=4.0 - working),
                line(15, rank, "last", ended="quantize", seconds=4.0, memory=2048 * MB),
                '{"time": "2026-01-01T10:0',  # the disk was full
            ]
        (folder / "logs" / f"rank{rank}.jsonl").write_text("\n".join(lines))
    return folder


def test_a_trace_has_a_track_a_rank_with_its_stages_and_waits_of_the_last_run(tmp_path: Path):
    events = trace_events(last_run(write_logs(tmp_path)))
    spans = {(e["pid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans == {
        (0, "fetch"): (0, 1_000_000),
        (0, "prepare"): (1_000_000, 1_000_000),
        (0, "quantize"): (2_000_000, 4_000_000),
        (0, "waits: whether to merge"): (3_000_000, 3_000_000),
        (1, "fetch"): (0, 1_000_000),
        (1, "prepare"): (1_000_000, 1_000_000),
        (1, "quantize"): (2_000_000, 4_000_000),
        (1, "waits: whether to merge"): (6_000_000, 0),
    }
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0", "rank 1"}
    assert not any("another job" in e["name"] for e in events)
    assert max(e["args"]["GiB"] for e in events if e["ph"] == "C") == 2.0


def test_the_command_writes_it_beside_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(TraceOptions(folder=write_logs(tmp_path)), None)
    assert json.loads((tmp_path / "logs" / "trace.json").read_text())["traceEvents"]
    assert "perfetto" in capsys.readouterr().out


def test_a_folder_without_logs_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no logs"):
        last_run(tmp_path)


@pytest.fixture
def own_log(tmp_path: Path) -> Iterator[Path]:
    before = {name: list(logs.logging.getLogger(name).handlers) for name in ("launcher", *logs._LIBRARIES)}
    level = logs._OURS.level
    logs.quiet_libraries()
    yield logs.open_log(tmp_path, 0, "a run")
    logs._OURS.setLevel(level)
    for name, handlers in before.items():
        logs.logging.getLogger(name).handlers[:] = handlers


def test_what_a_clock_logs_is_what_a_trace_reads(own_log: Path, tmp_path: Path):
    stage = StageClock(rank=0)
    for name in ("prepare", "merge", ""):
        stage.turn(name, memory=MB)
    assert [e["name"] for e in trace_events(last_run(tmp_path)) if e["ph"] == "X"] == ["prepare", "merge"]
