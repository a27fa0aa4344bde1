"""m3: a power of the mean activation, searched so that the weights' quantization shows least in the output (AWQ)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_core.arithmetic.numerics import Numerics
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.method import SmoothingConfig, SmoothingMethod
from quant_core.smoothing.statistics import FirstCall, Tokens, TokenSample

_GRID = [step / 20 for step in range(20)]
_LEAST_FACTOR = 1e-4


class M3ProcessorConfig(SmoothingConfig):
    """Suppress outliers with a searched power of the mean activation."""

    key: ClassVar[str] = "m3"


def factor(group: MeasuredGroup, config: M3ProcessorConfig) -> Tensor:
    """Return the candidate with the least loss, of equals the first, (I,)."""
    mean_I = group.mean_I
    candidates = [_candidate(mean_I, ratio) for ratio in _GRID]
    losses = group.total(torch.stack([_loss(group, candidate) for candidate in candidates]))
    return candidates[int(losses.argmin())]


def _candidate(mean_I: Tensor, ratio: float) -> Tensor:
    """Return `mean^ratio`, centred so that the largest and the smallest factor are each other's inverse."""
    factor_I = mean_I.pow(ratio).clamp(min=_LEAST_FACTOR)
    return factor_I / (factor_I.max() * factor_I.min()).sqrt()


def _loss(group: MeasuredGroup, factor_I: Tensor) -> Tensor:
    """Return the mean squared error of each linear's output, added up and weighted by the tokens it is the mean of."""
    loss = torch.zeros((), device=group.device)
    for x_NI, weights in group.samples():
        for w_OI in weights:
            scaled_OI = w_OI * factor_I
            weight = group.codec.encode(scaled_OI, group.codec.row_maxima(scaled_OI), scaled_OI.dtype, group.numerics)
            fake_OI = weight.fake / factor_I
            difference = F.linear(x_NI, w_OI).to(torch.float32) - F.linear(x_NI, fake_OI).to(torch.float32)
            loss += difference.square().mean() * len(x_NI)
    return loss


def _tokens(config: M3ProcessorConfig, numerics: Numerics, channels: int) -> Tokens:
    return FirstCall() if numerics.is_reference else TokenSample(channels)


METHOD = SmoothingMethod(M3ProcessorConfig, _tokens, factor)
