"""`mse`: the range with the least mean squared error of the layer's output, as far as the input's range decides it.

The values are counted with the importance of their channel, so the error that is least is not the activation's but
what becomes of it behind the weight (`quant_core.ranges.channel_importance`).

Clipping costs at the tails and finer steps gain everywhere; the best range balances them. The two ends only meet in
the step, so they are searched in turn: each over powers of two down from its extreme, then finely around the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.ranges.clipping_error import mean_squared_error
from quant_core.ranges.value_histogram import Distribution

# Fractions of an extreme: quarter octaves down to 2^-10, then sixteen points on both sides up to the neighbours.
_COARSE = torch.arange(0, 41, dtype=torch.float64).div(-4).exp2()
_FINE = torch.linspace(-0.25, 0.25, 33, dtype=torch.float64).exp2()
# The ends are nearly independent: a third round changes nothing that shows.
_ROUNDS = 2


def mse_range(values: Distribution) -> tuple[float, float]:
    """Return the best range found; never worse than the extremes, which are among the candidates."""
    ends = torch.tensor([min(values.low, 0.0), max(values.high, 0.0)], dtype=torch.float64)
    extremes = ends.clone()
    for _ in range(_ROUNDS):
        for end in (0, 1):
            ends = _best(values, ends, end, extremes[end] * _COARSE)
            ends = _best(values, ends, end, (ends[end] * _FINE).clamp(*extremes.tolist()))
    return ends[0].item(), ends[1].item()


def _best(values: Distribution, ends: Tensor, end: int, candidates_C: Tensor) -> Tensor:
    """Return the range with one end exchanged for the best candidate, or kept if none is better."""
    ranges_2C = ends.unsqueeze(1).repeat(1, len(candidates_C) + 1)
    ranges_2C[end, 1:] = candidates_C
    error_C = mean_squared_error(values, ranges_2C[0], ranges_2C[1])
    return ranges_2C[:, error_C.argmin()]
