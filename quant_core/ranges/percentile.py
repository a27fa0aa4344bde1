"""`percentile`: the shortest range that holds 99.99 % of the values, as attention's q and k have it (spec: FA3).

Cheap, and blind to how much a value matters: it gives up one value in ten thousand even where those are the outlier
channels that carry the layer's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.ranges.value_histogram import Distribution

SHARE = 0.9999


def percentile_range(values: Distribution) -> tuple[float, float]:
    """Return the shortest range with SHARE of the values, each bin's spread evenly over it."""
    upto_B = values.count_B.cumsum(0)
    before_B, held = upto_B - values.count_B, SHARE * values.count_B.sum()
    # A shortest range of evenly spread bins begins or ends where a bin does.
    begins, ends = before_B + held <= upto_B[-1], upto_B >= held
    low_C = torch.cat([values.left_B[begins], _point(values, upto_B[ends] - held, right=True)])
    high_C = torch.cat([_point(values, before_B[begins] + held, right=False), values.right_B[ends]])
    shortest = (high_C - low_C).argmin()
    return low_C[shortest].item(), high_C[shortest].item()


def _point(values: Distribution, below_C: Tensor, *, right: bool) -> Tensor:
    """Return the points that so many values lie below; of a gap between bins its right end, or its left."""
    upto_B = values.count_B.cumsum(0)
    bin_C = torch.searchsorted(upto_B, below_C, right=right).clamp(max=len(upto_B) - 1)
    left_C, count_C = values.left_B[bin_C], values.count_B[bin_C]
    share_C = ((below_C - upto_B[bin_C] + count_C) / count_C).clamp(0, 1)
    return left_C + share_C * (values.right_B[bin_C] - left_C)
