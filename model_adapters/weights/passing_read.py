"""Read large files once and leave the system's page cache about as it was, where there is no room to keep them.

A model that is larger than the memory there is pushes its own beginning out of the cache before it is read again, so
nothing is won by keeping it; and taking pages from elsewhere for all that is read is most of what reading costs
(measured: 1.3 seconds of processor for a GB, and 0.3 where the same pages come again). So what was read some time ago
is given up. Not at once: another rank of this host may be about to read the same.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# What was read last and may be read again, by another rank, which is at another layer.
_LAG_BYTES = 256 << 20
# The system gives up what it brought in together only as a whole, so stretches are longer than that.
_STRETCH_BYTES = 64 << 20


class _Stretch(NamedTuple):
    """Bytes of a file that were read."""

    path: Path
    start: int
    stop: int


class PassingRead:
    """Give up what was read in one thread, some time later; what lies in one piece is given up in one."""

    def __init__(self) -> None:
        self._read: deque[_Stretch] = deque()
        self._bytes = 0

    def note(self, path: Path, start: int, stop: int) -> None:
        """Note what has been read just now."""
        self._bytes += stop - start
        last = self._read[-1] if self._read else None
        if last and (last.path, last.stop) == (path, start) and stop - last.start <= _STRETCH_BYTES:
            start = self._read.pop().start
        self._read.append(_Stretch(path, start, stop))
        while self._bytes > _LAG_BYTES and len(self._read) > 1:
            self._give_up(self._read.popleft())

    def _give_up(self, stretch: _Stretch) -> None:
        length = stretch.stop - stretch.start
        self._bytes -= length
        # It was read already: whatever is wrong with the file now, nothing that this reader needs depends on it.
        with suppress(OSError), stretch.path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), stretch.start, length, os.POSIX_FADV_DONTNEED)
