"""Ask the system how much of a file is in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def cached_bytes(path: Path, start: int, stop: int) -> int:
    """Return how many bytes of a stretch of a file are in the page cache; both of its ends are where pages begin."""
    libc, length = ctypes.CDLL(None, use_errno=True), stop - start
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with path.open("rb") as file:
        place = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), start)
    pages = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    try:
        assert libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(length), pages) == 0
    finally:
        libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(length))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def require_pages_that_leave(folder: Path) -> None:
    """Skip a test whose files lie in a file system that is memory itself."""
    probe = folder / "probe"
    probe.write_bytes(bytes(mmap.PAGESIZE))
    with probe.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_bytes(probe, 0, mmap.PAGESIZE)
    probe.unlink()
    if left:
        pytest.skip("temporary files lie in memory here")
