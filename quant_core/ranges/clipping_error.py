"""How much 8 bits lose in a given range: the mean squared error of quantizing a distribution, without its values.

Inside the range a value moves to the nearest multiple of the step s, outside to the outermost multiple. Values are
taken as spread evenly over their bin, so a bin's error is an integral, and the integral has a closed form: a whole
step contributes s^3 / 12, the rest r^3 / 3, and what lies d beyond the end d^3 / 3.

Worked example: s = 0.1, a bin from 0.3 to 0.4. From 0.3 to 0.35 the error grows to 0.05, then falls back to 0: the
integral is 2 * 0.05^3 / 3 = 8.3e-5 = s^3 / 12, the mean over the bin s^2 / 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.arithmetic.scales import QMAX, QMIN, asymmetric_offset, asymmetric_scale
from quant_core.ranges.value_histogram import Distribution

# A bin that holds one repeated value has no width to average over; this much of the largest value is width enough.
_LEAST_WIDTH = 1e-9


def mean_squared_error(values: Distribution, low_C: Tensor, high_C: Tensor) -> Tensor:
    """Return the error of each of C candidate ranges, (C,) float64; low_C, high_C: (C,) float64."""
    scale_C = asymmetric_scale(low_C, high_C)
    offset_C = asymmetric_offset(low_C, scale_C).clamp(QMIN, QMAX)
    first_C1, last_C1 = (((code - offset_C) * scale_C).unsqueeze(1) for code in (QMIN, QMAX))
    least = _LEAST_WIDTH * max(-values.low, values.high) + torch.finfo(torch.float64).tiny
    right_B = torch.maximum(values.right_B, values.left_B + least)
    integral_CB = _integral(right_B, scale_C.unsqueeze(1), first_C1, last_C1)
    integral_CB -= _integral(values.left_B, scale_C.unsqueeze(1), first_C1, last_C1)
    share_B = values.count_B / values.count_B.sum()
    return (integral_CB / (right_B - values.left_B)) @ share_B


def _integral(upto_B: Tensor, scale_C1: Tensor, first_C1: Tensor, last_C1: Tensor) -> Tensor:
    """Integrate the squared error from 0 up to each point, (C, B)."""
    inside_CB = upto_B.clamp(first_C1, last_C1)
    steps_CB = torch.round(inside_CB / scale_C1)
    rest_CB = inside_CB - steps_CB * scale_C1
    beyond_CB = upto_B - inside_CB
    return steps_CB * scale_C1**3 / 12 + (rest_CB**3 + beyond_CB**3) / 3
