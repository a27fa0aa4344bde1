"""Lend host memory for large tensors, and lend it again as soon as no tensor refers to it.

Memory that a program gets anew, the system fills with zeros first, and that takes about as long as reading a weight
into it (measured on a model of 24 GB from disk to disk: a fifth of all processor time). Whoever works on one large
tensor after another, each for a moment, needs the same few blocks again and again.

A block comes back by itself: a lent tensor refers to an array, whose end is noticed. So nobody has to give anything
back, and nothing can be overwritten that somebody still sees. What it gives up: free blocks stay until they are
released.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

# shape, dtype -> a tensor with nothing in it yet
Empty = Callable[[Sequence[int], torch.dtype], Tensor]

# Smaller tensors are not worth a block.
_LEAST_BYTES = 1 << 20


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor in memory of its own, on the host."""
    return torch.empty(tuple(shape), dtype=dtype)


class ReusedMemory:
    """Lend memory to one thread; what was lent may end in any."""

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor on the host that holds anything; small ones have memory of their own."""
        size = prod(shape) * dtype.itemsize
        if size < _LEAST_BYTES:
            return fresh(shape, dtype)
        block = self._block(size)
        array = block.numpy()
        weakref.finalize(array, self._free.append, block).atexit = False
        return torch.from_numpy(array)[:size].view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Give the system back what nobody uses at the moment."""
        self._free.clear()

    def _block(self, size: int) -> Tensor:
        """Return a free block that is large enough, or a new one in the place of one that is not."""
        too_small: list[Tensor] = []
        while self._free:
            block = self._free.popleft()
            if block.numel() >= size:
                self._free.extend(too_small)
                return block
            too_small.append(block)
        self._free.extend(too_small[1:])
        return fresh((size,), torch.uint8)
