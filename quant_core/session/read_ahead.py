"""Read tensors in a thread of its own, some pieces ahead of whoever works on them.

A large tensor comes in pieces of some rows, so the memory that is needed does not grow with it, and what was read is
worked on before it has left the processor's cache. Pieces of 4 MB gain as much there as changing threads costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

# Of a full name of a tensor, and of a range of its rows if not all: this rank's part of it, on the host.
ReadTensor = Callable[..., Tensor]

# A piece of several rows has at most so many bytes.
PIECE_BYTES = 16 << 20
# When so much has been read, or is being read, beside what is worked on, no further piece is begun.
AHEAD_BYTES = 64 << 20


class Piece(NamedTuple):
    """A tensor, or some rows of it, and its bytes."""

    name: str
    size: int
    rows: slice | None = None


def row_pieces(name: str, rows: int, row_bytes: int) -> list[Piece]:
    """Return the pieces that a matrix is read in; one, where that is small enough."""
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    if rows <= step:
        return [Piece(name, rows * row_bytes)]
    ranges = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    return [Piece(name, (each.stop - each.start) * row_bytes, each) for each in ranges]


@contextmanager
def read_ahead(read: ReadTensor, pieces: Sequence[Piece]) -> Iterator[Iterator[Tensor]]:
    """Give the pieces in order; while one is worked on, the next one is read at least.

    What reading raises is raised where the piece is asked for. Whoever leaves early waits for one piece at most.
    """

    def read_piece(piece: Piece) -> Tensor:
        return read(piece.name) if piece.rows is None else read(piece.name, piece.rows)

    def ahead(thread: ThreadPoolExecutor) -> Iterator[Tensor]:
        """Yield what the thread has read, and have it read on meanwhile."""
        coming: deque[tuple[int, Future[Tensor]]] = deque()
        unread, size = deque(pieces), 0
        while unread or coming:
            while unread and (len(coming) < 2 or size < AHEAD_BYTES):
                piece = unread.popleft()
                coming.append((piece.size, thread.submit(read_piece, piece)))
                size += piece.size
            taken, piece_read = coming.popleft()
            size -= taken
            yield piece_read.result()

    with ThreadPoolExecutor(1, thread_name_prefix="reads ahead") as thread:
        try:
            yield ahead(thread)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
