"""A file that is written past the page cache has the bytes that it was given, on file systems of either kind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from quant_core.checkpoint import direct_blocks
from quant_core.checkpoint.direct_blocks import BLOCK_BYTES, DirectBlocks
from quant_core.checkpoint.ordered_writer import OrderedWriter
from tests.support.page_cache import cached_bytes, require_pages_that_leave

CONTENT = random.Random(0).randbytes(2 * BLOCK_BYTES + 12345)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def write(file: int, lengths: list[int]) -> list[int]:
    """Append the content in pieces of these lengths, again and again; returns the lengths of what was written."""
    written: list[int] = []
    blocks, place = DirectBlocks(file, lambda block: written.append(len(block))), 0
    while place < len(CONTENT):
        for length in lengths:
            blocks.append(memoryview(CONTENT)[place : place + length])
            place += length
    assert blocks.end == len(CONTENT)
    blocks.finish()
    return written


@pytest.mark.parametrize("lengths", [[len(CONTENT)], [BLOCK_BYTES], [1, 4095, 70_000], [BLOCK_BYTES + 1, 3]], ids=str)
def test_pieces_of_any_length_become_whole_blocks_and_an_end(file: int, lengths: list[int]):
    assert write(file, lengths) == [BLOCK_BYTES, BLOCK_BYTES, 12345]
    assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has only one way to write")
def test_whole_blocks_do_not_stay_in_the_page_cache(file: int, tmp_path: Path):
    require_pages_that_leave(tmp_path)
    write(file, [70_000])
    assert cached_bytes(tmp_path / "file", 0, 2 * BLOCK_BYTES) == 0


def refusing(kind: int):
    """Return a `pwrite` of a file system that refuses direct writes, or ends in the middle of one."""
    real = os.pwrite

    def pwrite(file: int, data: memoryview, place: int) -> int:
        is_direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
        if is_direct and kind == errno.EINVAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data[: 3 * 4096] if is_direct else data, place)

    return pwrite


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has only one way to write")
@pytest.mark.parametrize("kind", [errno.EINVAL, 0], ids=["refused", "a part of a block written"])
def test_what_cannot_be_written_directly_goes_through_the_cache(file: int, monkeypatch, kind: int):
    monkeypatch.setattr(direct_blocks.os, "pwrite", refusing(kind))
    write(file, [70_000])
    assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT


def test_a_full_disk_is_no_reason_to_try_another_way(file: int, monkeypatch):
    def full(file: int, data: memoryview, place: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_blocks.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(file, [BLOCK_BYTES])


def test_pieces_out_of_order_are_written_and_digested_among_large_ones(tmp_path: Path):
    cuts = [0, BLOCK_BYTES + 10, BLOCK_BYTES + 500, 2 * BLOCK_BYTES, len(CONTENT)]
    pieces = [(start, CONTENT[start:stop]) for start, stop in pairwise(cuts)]
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [1, 0, 2, 3]):
        writer = OrderedWriter(tmp_path / "file", digests=True)
        for index in order:
            start, data = pieces[index]
            writer.put(start, lambda data=data: memoryview(data))
        assert writer.close(keeps=True) == hashlib.sha256(CONTENT).hexdigest()
        assert (tmp_path / "file").read_bytes() == CONTENT
