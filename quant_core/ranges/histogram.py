"""`histogram`: shrink the range from its extremes as long as that lowers the error of the quantized activation.

This is the search of PyTorch's `HistogramObserver`: give up the outermost bin on the side where that narrows the range
more, and stop at the first step that makes the error greater. It stops in the first valley, so it clips less than
`mse`, which looks at all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.ranges.clipping_error import mean_squared_error
from quant_core.ranges.value_histogram import Distribution

# The search mostly ends early, so errors are computed for a few ranges at a time.
_BLOCK = 32


def histogram_range(values: Distribution) -> tuple[float, float]:
    """Return the last range before the error rises."""
    low_C, high_C = _shrinking(values)
    best = 0
    for start in range(0, len(low_C), _BLOCK):
        block = slice(start, start + _BLOCK + 1)  # one more than a block: the next one compares with it
        error_C = mean_squared_error(values, low_C[block], high_C[block])
        rises = (error_C[1:] > error_C[:-1]).nonzero()
        best = start + (int(rises[0]) if len(rises) else len(error_C) - 1)
        if len(rises):
            break
    return low_C[best].item(), high_C[best].item()


def _shrinking(values: Distribution) -> tuple[Tensor, Tensor]:
    """Return the ranges that the search passes through, from the extremes to a single bin, each (C,)."""
    left, right = values.left_B.tolist(), values.right_B.tolist()
    first, last = 0, len(left) - 1
    ranges = [(left[first], right[last])]
    while first < last:
        if left[first + 1] - left[first] >= right[last] - right[last - 1]:
            first += 1
        else:
            last -= 1
        ranges.append((left[first], right[last]))
    low_C, high_C = torch.tensor(ranges, dtype=torch.float64).unbind(1)
    return low_C, high_C
