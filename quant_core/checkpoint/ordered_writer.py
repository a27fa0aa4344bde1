"""Write pieces of a file to their places in a thread of their own, and know the file's digest when it is whole.

Writing and digesting take about as long as computing what is written, and wait for the disk. So whoever computes hands
a piece over and goes on. At most one piece waits: a second one makes the caller wait, so memory is bounded.

The digest grows with every piece that begins where the last one ended. What came in another order is read back at the
end. An error of the thread is raised where the next piece is handed over, or at the end; pieces behind it are dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread

from quant_core.checkpoint.direct_blocks import BLOCK_BYTES, DirectBlocks, write_all

_WAITING = 1

# Where a piece goes, and what makes its bytes, in the thread; None ends it.
_Piece = tuple[int, Callable[[], memoryview]] | None


class OrderedWriter:
    """Write a new file; `digests`: whether its sha256 is wanted."""

    def __init__(self, path: Path, *, digests: bool) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._digest, self._digested = hashlib.sha256() if digests else None, 0
        self._in_order = DirectBlocks(self._file, self._take)
        self._error: BaseException | None = None
        self._pieces: Queue[_Piece] = Queue(_WAITING)
        self._thread = Thread(target=self._run, name=f"writes {path.name}", daemon=True)
        self._thread.start()

    def put(self, place: int, piece: Callable[[], memoryview]) -> None:
        """Hand a piece over; it is asked for its bytes when it is written. Raises what an earlier piece failed of."""
        if self._error is not None:
            raise self._error
        self._pieces.put((place, piece))

    def close(self, *, keeps: bool) -> str | None:
        """End the thread and close the file; return the digest of its content, if wanted and if somebody keeps it.

        Raises what a piece failed of, if somebody keeps the file.
        """
        try:
            if not keeps:
                self._error = self._error or InterruptedError("nobody wants the rest")
            self._pieces.put(None)
            self._thread.join()
            if not keeps:
                return None
            if self._error is not None:
                raise self._error
            self._in_order.finish()
            return self._whole_digest()
        finally:
            os.close(self._file)

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is None:
                try:
                    self._write(*piece)
                except BaseException as error:  # raised in the thread that hands pieces over
                    self._error = error

    def _write(self, place: int, piece: Callable[[], memoryview]) -> None:
        data = piece()
        if place == self._in_order.end:
            self._in_order.append(data)
        else:
            self._in_order.finish()
            write_all(self._file, data, place)

    def _take(self, block: memoryview) -> None:
        """Digest what comes next in the file, while it is still in the processor's cache."""
        if self._digest is not None:
            self._digest.update(block)
            self._digested += len(block)

    def _whole_digest(self) -> str | None:
        if self._digest is None:
            return None
        while data := os.pread(self._file, BLOCK_BYTES, self._digested):
            self._digest.update(data)
            self._digested += len(data)
        return self._digest.hexdigest()
