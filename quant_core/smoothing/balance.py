"""The common formula of m4 and m6: divide what is hard to quantize between activations and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.smoothing.measured_group import MeasuredGroup

# A column of zeros has no say in its factor, and must not divide by zero.
_LEAST_WEIGHT = 1e-5


def balance(group: MeasuredGroup, alpha: float, beta: float) -> Tensor:
    """Return `amax^alpha / wmax^beta` for each channel, at least the model's floor, in the working precision (I,).

    An activation channel with maximum 16 over weights with maximum 0.25 gets at alpha = beta = 0.5 the factor
    4 / 0.5 = 8: both maxima become 2.
    """
    amax_I, wmax_I = group.amax_I, _at_least(group.wmax_I, _LEAST_WEIGHT)
    return _at_least(amax_I.pow(alpha) / wmax_I.pow(beta), group.floor)


def _at_least(x: Tensor, least: float) -> Tensor:
    return x.to(torch.float32).clamp(min=least).to(x.dtype)
