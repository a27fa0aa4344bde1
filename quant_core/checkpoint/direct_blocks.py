"""Write a file from its beginning in large blocks that go to the disk directly, past the system's page cache.

Nobody reads a checkpoint right after it was written. Through the cache each of its pages would be taken from whatever
the cache holds, such as the model that is being read, filled, and written later: measured, 1 to 2 seconds of processor
for a GB, and 0.1 in blocks of 4 MB that lie where the disk's controller can take them from.

What a file system cannot write directly, and the end of a file, which is no whole block, goes through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable

# A multiple of any disk's block; large enough that a disk is busy though only one is written at a time.
BLOCK_BYTES = 4 << 20
# Not every system knows it.
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectBlocks:
    """Collect bytes into blocks and write these; written: is given the bytes of each block, or of the end."""

    def __init__(self, file: int, written: Callable[[memoryview], object]) -> None:
        self._file, self._written = file, written
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # begins where a page of memory does
        self._start, self._filled = 0, 0
        self._is_direct = _O_DIRECT != 0 and _set_direct(file, on=True)

    @property
    def end(self) -> int:
        """The place behind all that was appended."""
        return self._start + self._filled

    def append(self, data: memoryview) -> None:
        """Take the bytes that come next in the file."""
        while len(data):
            taken = data[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled, data = self._filled + len(taken), data[len(taken) :]
            if self._filled == BLOCK_BYTES:
                self._write_block()

    def finish(self) -> None:
        """Write what is no whole block; from here on the file is written through the cache."""
        self._through_cache()
        if self._filled:
            self._write_block()

    def _write_block(self) -> None:
        block = self._block[: self._filled]
        done = self._write_directly(block) if self._is_direct else 0
        write_all(self._file, block[done:], self._start + done)
        self._written(block)
        self._start, self._filled = self.end, 0

    def _write_directly(self, block: memoryview) -> int:
        """Return how much of a block was written; where it is not all, the next ones go through the cache."""
        try:
            done = os.pwrite(self._file, block, self._start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            done = 0
        if done < len(block):
            self._through_cache()
        return done

    def _through_cache(self) -> None:
        if self._is_direct:
            self._is_direct = False
            _set_direct(self._file, on=False)


def write_all(file: int, data: memoryview, place: int) -> None:
    """Write bytes to their place, in as many calls as it takes."""
    while len(data):
        count = os.pwrite(file, data, place)
        data, place = data[count:], place + count


def _set_direct(file: int, *, on: bool) -> bool:
    """Switch writing past the cache on or off; return whether the file system could."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError:
        return False
    return True
