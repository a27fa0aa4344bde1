"""Rotate the channels of attention heads: an orthogonal matrix on the values, and the same one again behind them.

An attention's output is a mean of its values, channel by channel, so within a head a rotation of the values is one of
the output. With H a Hadamard matrix of the head's size, divided by the square root of that size, `W_v' = H W_v` and
`W_out' = W_out H` on the head's columns leave the model as it is, because H is symmetric and H H = 1. What was one
massive channel is then spread over all channels of the head, and a range for all of them wastes less. Nothing is
computed at run time.

Worked example, a head of two channels, H = [[1, 1], [1, -1]] / sqrt(2): the values (100, 2) become (72.1, 69.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def is_rotatable(head_size: int) -> bool:
    """Tell whether there is a Hadamard matrix of that size made by doubling: of powers of two from 2 on."""
    return head_size > 1 and head_size.bit_count() == 1


@dataclass(frozen=True)
class Rotation:
    """Say how one linear changes: its rows, which make values, or its first `columns`, which read the heads' output.

    Each change is its own inverse. Whole heads only: a rank's part of a layer changes like the whole of it.
    """

    head_size: int
    columns: int | None = None

    def weight(self, w_OI: Tensor) -> Tensor:
        """Return the weight changed: computed in float32 at least, rounded once to its dtype."""
        if self.columns is None:
            return _rotate(w_OI.T, self.head_size, len(w_OI)).T.contiguous()
        return _rotate(w_OI, self.head_size, self.columns)

    def bias(self, b_O: Tensor) -> Tensor:
        """Return the bias changed in the same way."""
        return b_O if self.columns is not None else _rotate(b_O, self.head_size, len(b_O))

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return the linear's tensor of that name, `weight` or `bias`, changed."""
        return self.weight(tensor) if name == "weight" else self.bias(tensor)

    def input(self, x: Tensor) -> Tensor:
        """Return what the changed linear reads where the unchanged one reads x, (..., I)."""
        return x if self.columns is None else _rotate(x, self.head_size, self.columns)

    def output(self, y: Tensor) -> Tensor:
        """Return what the changed linear makes where the unchanged one makes y, (..., O)."""
        return y if self.columns is not None else _rotate(y, self.head_size, y.shape[-1])


def _rotate(x: Tensor, size: int, width: int) -> Tensor:
    """Return x (..., C) with the heads of its first channels rotated; the others stay."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = x[..., :width].to(dtype).unflatten(-1, (-1, size))
    rotated = (heads @ _hadamard(size).to(x.device, dtype)).flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


@lru_cache
def _hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two, float64: each doubling puts [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
