"""A job's logs as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: a track for each rank.

The track shows the rank's stages, and inside them where it waited for others, so that a slow rank shows as the one that
does not wait. Clocks of several hosts are shown as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from launcher.journal.logs import LOGS
from quant_core.errors import InputError

# A run that ended it was let into its folders: a second job in those of another is refused there.
FIRST_STAGE = "prepare"


class Line(BaseModel):
    """One line of a log; what of it other modules do not read is left out.

    run: which job it is of; stage: which begins; ended: which does, after `seconds` and with `memory` bytes at most;
    wait: what was waited for, `seconds`; words: of the command line.
    """

    model_config = ConfigDict(frozen=True)

    time: datetime
    run: str = ""
    rank: int
    level: str
    source: str = Field(alias="from")
    text: str
    stage: str | None = None
    ended: str | None = None
    wait: str | None = None
    seconds: FiniteFloat = 0.0
    memory: int = 0
    words: tuple[str, ...] = ()


def last_run(folder: Path, stage: str = FIRST_STAGE) -> dict[int, list[Line]]:
    """Return the lines that each rank logged in the last run of a job that finished a stage, by rank.

    Raises InputError where no run that did has logged.
    """
    runs: dict[str, dict[int, list[Line]]] = {}
    for path in sorted((folder / LOGS).glob("rank*.jsonl")):
        for line in _lines(path):
            runs.setdefault(line.run, {}).setdefault(line.rank, []).append(line)
    finished = [run for run in runs.values() if any(line.ended == stage for line in chain(*run.values()))]
    if not finished:
        raise InputError(
            f"there are no logs of a job that finished {stage}",
            where=str(folder / LOGS),
            why="a job logs beside its weights, or beside its images if it makes no weights",
            advice="give the --quant_weight_save_folder of the job",
        )
    last = max(finished, key=lambda run: min(moment(lines[0]) for lines in run.values()))
    return dict(sorted(last.items()))


def trace_events(ranks: Mapping[int, Sequence[Line]]) -> list[dict[str, Any]]:
    """Return the events of a trace: times in microseconds since the first one."""
    start = min(moment(line) for lines in ranks.values() for line in lines)
    events: list[dict[str, Any]] = []
    for rank, lines in ranks.items():
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        events.append({"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}})
        for line in lines:
            events += _events_of(line, rank, start)
    return events


def trace(folder: Path) -> str:
    """Return the trace of the last run whose logs are in a folder, as JSON."""
    return json.dumps({"traceEvents": trace_events(last_run(folder)), "displayTimeUnit": "ms"}, ensure_ascii=False)


def moment(line: Line) -> float:
    """Return when a line was logged, in seconds of the epoch."""
    return line.time.timestamp()


def _events_of(line: Line, rank: int, start: float) -> Iterator[dict[str, Any]]:
    at = (moment(line) - start) * 1e6
    common = {"pid": rank, "tid": 0}
    if line.ended is not None or line.wait is not None:
        name = f"waits: {line.wait}" if line.ended is None else line.ended
        length = line.seconds * 1e6
        yield {**common, "name": name, "ph": "X", "ts": round(at - length), "dur": round(length)}
    elif line.level in ("warning", "error", "critical") or line.source == "launcher":
        yield {**common, "name": line.text[:200], "ph": "i", "ts": round(at), "s": "t"}
    if line.memory:
        yield {"pid": rank, "name": "memory in GiB", "ph": "C", "ts": round(at), "args": {"GiB": line.memory / 2**30}}


def _lines(path: Path) -> Iterator[Line]:
    """Return the sound lines of a log; a rank that was killed may have left half of one."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValidationError):
            yield Line.model_validate_json(text)
