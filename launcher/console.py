"""Tell the person at the terminal what the job does: rank 0 speaks, the others are silent."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass
class Console:
    """Print the lines of one rank; progress at most once in `interval_s` seconds and at the end of a stage."""

    speaks: bool
    interval_s: float = 5.0
    _last: float = field(default=0.0, repr=False)

    def say(self, text: str) -> None:
        """Print one line."""
        if self.speaks:
            print(text, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Print how far a stage is, seldom enough for a log file."""
        now = time.monotonic()
        if done == total or now - self._last >= self.interval_s:
            self._last = now
            self.say(f"{stage}: {done}/{total}")

    def complain(self, text: str) -> None:
        """Print an error, whoever has it."""
        print(text, file=sys.stderr, flush=True)
