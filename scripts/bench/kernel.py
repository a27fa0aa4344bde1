"""Row maxima and int8 codes at the speed of memory: blocks of rows in buffers that stay in the cache.

A weight of FLUX is 100 MB, so every operation over all of it goes to memory and back, and every temporary is a new
mapping whose pages the kernel zeroes first. `torch.round(w.float() / s)` over the whole does that four times. Over a
block of rows with buffers that are reused, only the weight is read and only the codes are written.

Worked example: (18432, 3072) in bfloat16, 56.6 million weights. Read 113 MB, written 57 MB of codes: no more than
a copy of the weight moves. The block of 170 rows in float32 is 2 MB.

The codes and scales are those of `quant_core` with numerics 'float32', bit for bit: the scale is rounded to the model's
dtype first, and the codes are taken from that stored scale in float32. What a block cannot know is a maximum that
other ranks share, so maxima and codes are two passes; `quantize_rows` does both in one where nobody shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QMAX = 127
# float32's resolution: the scale of a row of zeros only has to be no zero.
EPS = 2.0**-23
# Numbers of a block, 2 MB in float32: half as many are slower by the calls per block, twice as many no faster.
BLOCK_NUMEL = 2**19


@dataclass(frozen=True)
class Workspace:
    """Hold the buffer of one thread."""

    numbers: Tensor

    @staticmethod
    def of(columns: int, numel: int, device: torch.device | str = "cpu") -> Workspace:
        """Make the buffer for weights of at most so many columns and numbers.

        Rows are as many as make a block, one at least; on an accelerator a block is the whole weight.
        """
        is_cpu = torch.device(device).type == "cpu"
        return Workspace(torch.empty(max(1, BLOCK_NUMEL // columns) * columns if is_cpu else numel, device=device))

    def load(self, block_RI: Tensor) -> Tensor:
        """Return the block in float32, in the buffer: overwritten by the next call."""
        return self.numbers[: block_RI.numel()].view(block_RI.shape).copy_(block_RI)

    def blocks(self, w_OI: Tensor) -> Iterator[slice]:
        """Yield the rows of each block of a weight."""
        step = max(1, self.numbers.numel() // w_OI.shape[1])
        for first in range(0, len(w_OI), step):
            yield slice(first, min(first + step, len(w_OI)))


def row_maxima(w_OI: Tensor, amax_O1: Tensor, work: Workspace) -> None:
    """Write the absolute maximum of each row to `amax_O1`, float32."""
    for rows in work.blocks(w_OI):
        _maxima(work.load(w_OI[rows]), amax_O1[rows])


def row_codes(w_OI: Tensor, scale_O1: Tensor, codes_OI: Tensor, work: Workspace) -> None:
    """Write the int8 codes of the weight to `codes_OI`; scale_O1: float32, of the stored scales' values."""
    for rows in work.blocks(w_OI):
        _codes(work.load(w_OI[rows]), scale_O1[rows], codes_OI[rows])


def stored_scale(amax_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales of rows with these maxima (float32) in the dtype they are stored in, (O, 1)."""
    scale_O1 = (amax_O1 / torch.full_like(amax_O1, QMAX)).clamp(min=EPS).to(dtype)
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # A subnormal scale may be rounded so far down that its row's maximum has no code.
    falls_short_O1 = scale_O1.to(torch.float32) * (QMAX + 0.5) < amax_O1
    return torch.where(falls_short_O1, scale_O1 + unit, scale_O1)


def quantize_rows(w_OI: Tensor, codes_OI: Tensor, work: Workspace) -> Tensor:
    """Write the codes of a weight whose scales are its own, in one pass; returns the stored scales (O, 1)."""
    amax_O1 = torch.empty(len(w_OI), 1, device=w_OI.device)
    scale_O1 = torch.empty(len(w_OI), 1, dtype=w_OI.dtype, device=w_OI.device)
    for rows in work.blocks(w_OI):
        block_RI = work.load(w_OI[rows])
        _maxima(block_RI, amax_O1[rows])
        scale_O1[rows] = stored_scale(amax_O1[rows], w_OI.dtype)
        _codes(block_RI, scale_O1[rows].to(torch.float32), codes_OI[rows])
    return scale_O1


def _maxima(block_RI: Tensor, amax_R1: Tensor) -> None:
    # Two reductions of what is in the cache, because `abs` would need a second buffer; `aminmax` is ten times slower.
    torch.maximum(block_RI.amax(1, keepdim=True), block_RI.amin(1, keepdim=True).neg_(), out=amax_R1)


def _codes(block_RI: Tensor, scale_R1: Tensor, codes_RI: Tensor) -> None:
    # The clamp is for scales that are subnormal in float16, where a maximum may lie exactly half a step behind 127.
    codes_RI.copy_(block_RI.div_(scale_R1).round_().clamp_(-QMAX, QMAX))
