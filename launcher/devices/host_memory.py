"""Large blocks of host memory: in pages of 2 MB, and back to the system as soon as they are freed.

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

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it when it first allocates
_M_MMAP_THRESHOLD = -3  # the number of the parameter in malloc.h
_THRESHOLD = 1 << 20


def use_large_pages() -> None:
    """Have torch ask for large pages, unless the user has said something else; before torch is imported."""
    os.environ.setdefault(_LARGE_PAGES, "1")


def return_large_blocks() -> bool:
    """Fix the threshold for the rest of the process; returns whether this C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _THRESHOLD) == 1
