"""The host's memory: whether files have room in it, and how large blocks of it are taken and given back.

In pages of 2 MB, and back to the system as soon as they are freed:

A tensor of 100 MB in pages of 4 KB is 27,000 faults, which take longer than reading it does (measured: filling fresh
tensors goes at 2 GB/s, and at 5 to 7 in large pages). torch asks for those where this variable says so.

glibc learns from the sizes that a program frees: after the first 30 MB tensor it serves all smaller ones from its
heap, where a small tensor that stays (a layer's codes) pins the hole that a large one left. Quantizing a model in
layers of 16 MB then takes twice the memory that its tensors have (measured: 1.06 GiB for 0.5). A fixed threshold turns
that off; each large tensor is a mapping of its own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it when it first allocates
_M_MMAP_THRESHOLD = -3  # the number of the parameter in malloc.h
_THRESHOLD = 1 << 20
# The share of memory that files may take before they push out their own beginning.
_CACHEABLE = 0.7
# Controllers of a control group, as the kernel lists them (none in version 2) -> where its limit stands.
_LIMITS = {
    "": "sys/fs/cgroup{group}/memory.max",
    "memory": "sys/fs/cgroup/memory{group}/memory.limit_in_bytes",
}


def use_large_pages() -> None:
    """Have torch ask for large pages, unless the user has said something else; before torch is imported."""
    os.environ.setdefault(_LARGE_PAGES, "1")


def return_large_blocks() -> bool:
    """Fix the threshold for the rest of the process; returns whether this C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _THRESHOLD) == 1


def fits_in_memory(size: int) -> bool:
    """Tell whether files of so many bytes have room in the page cache, beside what else this host is about to do."""
    import psutil  # not where a process starts

    return size <= min([psutil.virtual_memory().available, *group_limits()]) * _CACHEABLE


def group_limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield the bytes that this process's control groups may use, of either version: less than the host in a container.

    root: where the system's files lie; other systems have none of them, and a group without a limit says no number.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if known := _LIMITS.get(controllers):
                with suppress(OSError, ValueError):
                    yield int((root / known.format(group=group)).read_text())
