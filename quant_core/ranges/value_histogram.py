"""Count values on a grid that is the same for every layer, call and rank, so that counts simply add up.

A histogram whose bins follow the data has to be rebinned whenever the data widens, and then the result depends on the
order of the calls. Here the bins are fixed: 32 for each power of two, equally wide inside it, from 2^-24 (half of the
least scale there is: less rounds to 0 with any scale) up to 2^24, for each sign, and one bin around 0. They are the
floating-point format's own exponent and first five bits of the mantissa, so the bin of a value is a shift of its bits.

Worked example: 1.30 = 2^0 * 1.30 lies in bin floor(0.30 * 32) = 9 of its power of two, [1.28125, 1.3125). A bin is
between 1.6 and 3.1 % of its values wide. A layer's state is 3073 counters, 24 KiB, whatever the number of records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_EXPONENT, MAX_EXPONENT = -24, 24
BINS_PER_OCTAVE = 32
_MANTISSA_SHIFT = 23 - 5  # of 23 bits, the first five stay: 2**5 bins
_FIRST = (127 + MIN_EXPONENT) * BINS_PER_OCTAVE  # shifted bits of 2**MIN_EXPONENT; 127 is the exponent's bias
_SIDE = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE
BINS = 2 * _SIDE + 1
# Counting a call in pieces bounds the memory for bin numbers and weights to 64 MiB.
_PIECE = 2**22


def count_values(x: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """Return how many values of x (..., I) each bin holds, (BINS,) int64 on x's device.

    importance_I: as how many each value of a channel counts, int64; one when left out. Values beyond the grid,
    infinities and NaN count in the outermost bins.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    x_NI = x.detach().reshape(-1, x.shape[-1])
    for piece_NI in x_NI.split(max(_PIECE // x.shape[-1], 1)):
        bins = _bin_of(piece_NI).to(torch.int64)
        weights = torch.ones_like(bins) if importance_I is None else importance_I.to(x.device).expand_as(bins)
        counts.scatter_add_(0, bins.flatten(), weights.flatten())
    return counts


def _bin_of(x: Tensor) -> Tensor:
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    away_from_zero = ((bits & 0x7FFFFFFF) >> _MANTISSA_SHIFT).sub_(_FIRST - 1).clamp_(0, _SIDE)
    return torch.where(bits < 0, _SIDE - away_from_zero, _SIDE + away_from_zero)


def bin_edges() -> Tensor:
    """Return the ends of all bins in ascending order, (BINS + 1,) float64."""
    octaves = torch.arange(MIN_EXPONENT, MAX_EXPONENT, dtype=torch.float64).exp2()
    within = 1 + torch.arange(BINS_PER_OCTAVE, dtype=torch.float64) / BINS_PER_OCTAVE
    positive = torch.cat([torch.outer(octaves, within).flatten(), torch.tensor([2.0**MAX_EXPONENT]).double()])
    return torch.cat([-positive.flip(0), positive])


@dataclass(frozen=True)
class Distribution:
    """Describe the values that were seen: bins that hold some, in ascending order, all (B,) float64 on the host.

    The outermost ends are the true extremes.
    """

    left_B: Tensor
    right_B: Tensor
    count_B: Tensor

    @property
    def low(self) -> float:
        """Return the least value."""
        return self.left_B[0].item()

    @property
    def high(self) -> float:
        """Return the greatest value."""
        return self.right_B[-1].item()


def distribution(counts: Tensor, low: Tensor, high: Tensor) -> Distribution:
    """Return the distribution of at least one value; counts: (BINS,); low, high: its extremes, scalars."""
    edges, counts = bin_edges(), counts.cpu()
    low, high = low.cpu().double(), high.cpu().double()
    edges[0], edges[-1] = edges[0].minimum(low), edges[-1].maximum(high)
    held = counts > 0
    left_B, right_B = edges[:-1][held].clamp(low, high), edges[1:][held].clamp(low, high)
    return Distribution(left_B, right_B, counts[held].double())
