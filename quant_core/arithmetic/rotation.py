"""Rotate the channels of attention heads: an orthogonal matrix on the values, and the same one again behind them.

An attention's output is a mean of its values, channel by channel, so within a head a rotation of the values is one of
the output. With H a Hadamard matrix of the head's size, divided by the square root of that size, `W_v' = H W_v` and
`W_out' = W_out H` on the head's columns leave the model as it is, because H is symmetric and H H = 1. What was one
massive channel is then spread over all channels of the head, and a range for all of them wastes less. Nothing is
computed at run time.

A channel may first be divided by a number that the columns that read it are multiplied by, `W_v' = H W_v / s` and
`W_out' = W_out s H`, which leaves the model as it is too (`quant_core/attention/value_levels.py` chooses s).

Worked example, a head of two channels, H = [[1, 1], [1, -1]] / sqrt(2): the values (100, 2) become (72.1, 69.3), and
with s = (32, 1), (3.6, 0.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Two to half of it is more than a float32 holds.
_MOST_LEVEL = 256


def is_rotatable(head_size: int) -> bool:
    """Tell whether there is a Hadamard matrix of that size made by doubling: of powers of two from 2 on."""
    return head_size > 1 and head_size.bit_count() == 1


@dataclass(frozen=True)
class Rotation:
    """Say how one linear changes: its rows, which make values, or its first `columns`, which read the heads' output.

    levels: each channel of the values is divided by 2 ** (level / 2) first; none: by nothing. Whole heads only: a
    rank's part of a layer changes like the whole of it.
    """

    head_size: int
    columns: int | None = None
    levels: tuple[int, ...] = ()

    def fits(self, outputs: int, inputs: int) -> bool:
        """Tell whether a linear of that shape can have been changed so: whole heads, and all levels or none."""
        width, most = (outputs, outputs) if self.columns is None else (self.columns, inputs)
        has_levels = len(self.levels) in (0, width) and all(abs(level) < _MOST_LEVEL for level in self.levels)
        return is_rotatable(self.head_size) and 0 < width <= most and width % self.head_size == 0 and has_levels

    def weight(self, w_OI: Tensor) -> Tensor:
        """Return the weight changed: computed in float32 at least, rounded once to its dtype."""
        if self.columns is None:
            return self._rotate(w_OI.T, in_front=-1).T.contiguous()
        return self._rotate(w_OI, in_front=1)

    def bias(self, b_O: Tensor) -> Tensor:
        """Return the bias changed in the same way."""
        return b_O if self.columns is not None else self._rotate(b_O, in_front=-1)

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return the linear's tensor of that name, `weight` or `bias`, changed."""
        return self.weight(tensor) if name == "weight" else self.bias(tensor)

    def unchanged(self, w_OI: Tensor) -> Tensor:
        """Return the weight of which `weight` makes this one."""
        if self.columns is None:
            return self._rotate(w_OI.T, behind=1).T.contiguous()
        return self._rotate(w_OI, behind=-1)

    def input(self, x: Tensor) -> Tensor:
        """Return what the changed linear reads where the unchanged one reads x, (..., I)."""
        return x if self.columns is None else self._rotate(x, in_front=-1)

    def output(self, y: Tensor) -> Tensor:
        """Return what the unchanged linear makes where the changed one makes y, (..., O)."""
        return y if self.columns is not None else self._rotate(y, behind=1)

    def _rotate(self, x: Tensor, *, in_front: int = 0, behind: int = 0) -> Tensor:
        """Return x (..., C) with the heads of its channels rotated, times the divisors to a power before or after."""
        width, dtype = self.columns or x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        heads = x[..., :width].to(dtype)
        log_C = torch.tensor(self.levels or (0,), dtype=dtype, device=x.device) / 2
        hadamard = _hadamard(self.head_size).to(x.device, dtype)
        rotated = ((heads * (in_front * log_C).exp2()).unflatten(-1, (-1, self.head_size)) @ hadamard).flatten(-2)
        rotated = (rotated * (behind * log_C).exp2()).to(x.dtype)
        return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


@lru_cache
def _hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two, float64: each doubling puts [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
