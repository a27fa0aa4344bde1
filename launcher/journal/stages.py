"""How long each stage of a job takes on a rank, and the most memory that ranks hold in it: said, and logged.

Every rank logs its own; rank 0 says a line for people, with the rank that held most. What takes a moment is logged
only: a job on files that are there already passes through its stages in no time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from launcher.journal.console import format_seconds
from launcher.journal.logs import log

_MOMENT_S = 1.0


@dataclass
class StageClock:
    """Time one stage after the other on a rank."""

    rank: int
    stage: str = ""
    _began: float = 0.0
    # rank -> the most bytes that it was seen to hold in this stage
    _peaks: dict[int, int] = field(default_factory=dict)

    def see(self, rank: int, memory: int) -> None:
        """Note the bytes that a rank holds now."""
        self._peaks[rank] = max(memory, self._peaks.get(rank, 0))

    def turn(self, stage: str, memory: int) -> str | None:
        """End the running stage and begin another ("": none), this rank holding so many bytes; return what to say."""
        self.see(self.rank, memory)
        line = self._end() if self.stage else None
        self.stage, self._began, self._peaks = stage, time.monotonic(), {self.rank: memory}
        if stage:
            log(f"begins: {stage}", stage=stage)
        return line

    def _end(self) -> str | None:
        seconds, peaks = time.monotonic() - self._began, dict(self._peaks)  # another thread may see meanwhile
        log(f"ends: {self.stage}", ended=self.stage, seconds=round(seconds, 3), memory=peaks[self.rank])
        if seconds < _MOMENT_S:
            return None
        most = max(peaks, key=lambda rank: peaks[rank])
        where = f" on rank {most}" if len(peaks) > 1 else ""
        return f"{self.stage} took {format_seconds(seconds)}, at most {peaks[most] / 2**30:.1f} GiB{where}"
