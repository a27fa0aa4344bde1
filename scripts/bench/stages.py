"""Follow a job through its stages: how long each took on each rank, and how much memory it had at its worst.

When a stage begins stands in the ranks' logs; memory was sampled from outside. The same stage may come twice
(calibrating begins, loads, and goes on): its times add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stage on one rank: seconds, and what was resident in bytes: at most, and when it ended."""

    rank: int
    name: str
    seconds: float
    peak_bytes: int
    left_bytes: int


def read_stages(weights: Path, resident: Mapping[int, Sequence[tuple[float, int]]]) -> list[Stage]:
    """Return the stages of all ranks of the job that wrote into that folder, in the order they began."""
    return [stage for rank in sorted(resident) if rank >= 0 for stage in _of_rank(weights, rank, resident[rank])]


def begun(weights: Path, rank: int) -> list[tuple[float, str]]:
    """Return when each stage began on a rank, in seconds since the epoch, and its name."""
    return [(_seconds(entry["time"]), entry["stage"]) for entry in log_lines(weights, rank) if "stage" in entry]


def said(weights: Path, rank: int, beginning: str) -> list[float]:
    """Return when a rank logged a line that begins like this, in seconds since the epoch."""
    return [_seconds(entry["time"]) for entry in log_lines(weights, rank) if entry["text"].startswith(beginning)]


def log_lines(weights: Path, rank: int) -> list[dict[str, Any]]:
    """Return the entries of a rank's log."""
    text = (weights / "logs" / f"rank{rank}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _of_rank(weights: Path, rank: int, samples: Sequence[tuple[float, int]]) -> Iterator[Stage]:
    starts = begun(weights, rank)
    times: dict[str, float] = {}
    sizes: dict[str, list[int]] = {}
    ends = [start for start, _ in starts[1:]] + [samples[-1][0]]
    for (start, name), end in zip(starts, ends):
        times[name] = times.get(name, 0.0) + end - start
        sizes.setdefault(name, []).extend(size for at, size in samples if start <= at < end)
    for name, seconds in times.items():
        seen = sizes[name] or [0]  # a stage may be shorter than the time between two samples
        yield Stage(rank, name, seconds, max(seen), seen[-1])


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
