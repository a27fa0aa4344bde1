"""m3: a power of the mean activation, searched so that the weights' quantization shows least in the output (AWQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_core.arithmetic.numerics import Numerics
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.method import SmoothingConfig, SmoothingMethod
from quant_core.smoothing.product_errors import product_errors
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
    found = _reference_losses if group.numerics.is_reference else _losses
    losses = group.total(found(group, candidates))
    return candidates[int(losses.argmin())]


def _candidate(mean_I: Tensor, ratio: float) -> Tensor:
    """Return `mean^ratio`, centred so that the largest and the smallest factor are each other's inverse."""
    factor_I = mean_I.pow(ratio).clamp(min=_LEAST_FACTOR)
    return factor_I / (factor_I.max() * factor_I.min()).sqrt()


def _losses(group: MeasuredGroup, candidates: Sequence[Tensor]) -> Tensor:
    """Return for each candidate the squared error of each linear's outputs, summed over tokens, the mean of rows."""
    losses = torch.zeros(len(candidates), device=group.device)
    for x_NI, weights in group.samples():
        for w_OI, found in zip(weights, product_errors(x_NI, weights, candidates, group.codec)):
            losses += found.errors / len(w_OI)
    return losses


def _reference_losses(group: MeasuredGroup, candidates: Sequence[Tensor]) -> Tensor:
    """Return the same in the reference tool's arithmetic, on whole tensors: blocks would add up in another order."""
    losses = torch.zeros(len(candidates), device=group.device)
    for x_NI, weights in group.samples():
        for w_OI in weights:
            exact, fake_OI = F.linear(x_NI, w_OI).to(torch.float32), torch.empty_like(w_OI)
            for index, factor_I in enumerate(candidates):
                scaled_OI = w_OI * factor_I
                amax_O1 = group.codec.row_maxima(scaled_OI)
                group.codec.encode(scaled_OI, amax_O1, scaled_OI.dtype, group.numerics, fake_OI=fake_OI)
                difference = exact - F.linear(x_NI, fake_OI.div_(factor_I)).to(torch.float32)
                losses[index] += difference.square().mean() * len(x_NI)
    return losses


def _tokens(config: M3ProcessorConfig, numerics: Numerics, channels: int) -> Tokens:
    return FirstCall() if numerics.is_reference else TokenSample(channels)


METHOD = SmoothingMethod(M3ProcessorConfig, _tokens, factor)
