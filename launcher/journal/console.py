"""Tell the person at the terminal what the job does: rank 0 speaks, the others are silent.

On a terminal there is one live line per stage; elsewhere (a batch job's log) plain lines, seldom enough to be read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launcher.journal.logs import log


@dataclass
class Console:
    """Show the progress of one job; every rank has one, and all but the first are silent.

    `note` adds what only others know: the slowest rank, memory. Plain lines come at most once in `interval_s` seconds
    and at the end of a stage.
    """

    speaks: bool
    interval_s: float = 5.0
    note: Callable[[], str] = lambda: ""
    live: bool = field(default_factory=lambda: sys.stdout is not None and sys.stdout.isatty())
    _last: float = field(default=0.0, repr=False)
    _stage: str = field(default="", repr=False)
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False)
    _bar: Any = field(default=None, repr=False)

    def say(self, text: str) -> None:
        """Print one line."""
        log(text)
        if self.speaks:
            self._printer()(text)

    def progress(self, stage: str, done: int, total: int, part: float = 0.0) -> None:
        """Show how far a stage is: `done` of `total`, and the fraction of the next one that is done."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._last = stage, (now, done), 0.0
        if not self.speaks:
            return
        if self.live:
            self._show_bar(stage, done + part, total)
        elif done == total or now - self._last >= self.interval_s:
            self._last = now
            remarks = ", ".join(filter(None, [self._eta(done + part, total, now), self.note()]))
            self._printer()(f"{stage}: {done}/{total}" + (f" ({remarks})" if remarks else ""))

    def close(self) -> None:
        """Take the live display down, so that what follows stands below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _eta(self, done: float, total: int, now: float) -> str:
        """Estimate from what this run did; what an earlier run had finished took no time now."""
        since, first = self._began
        if not first < done < total:
            return ""
        return f"{format_seconds((now - since) / (done - first) * (total - done))} left"

    def _printer(self) -> Callable[[str], None]:
        if self._bar is None:
            return lambda text: print(f"{text}\n", end="", flush=True)  # one write: ranks share the terminal
        return lambda text: self._bar.console.print(text, markup=False, highlight=False)

    def _show_bar(self, stage: str, done: float, total: int) -> None:
        if self._bar is None:
            self._bar = _live_display()
            self._bar.start()
        task = next((task for task in self._bar.tasks if task.description == stage), None)
        number = task.id if task is not None else self._bar.add_task(stage, total=total, note="")
        self._bar.update(number, completed=done, total=total, note=self.note())


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 12 min, 1 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _live_display() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
