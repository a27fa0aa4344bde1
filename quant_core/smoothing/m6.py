"""m6: the balance of activation and weight maxima with two exponents, which are searched where they are not given.

The search compares the product of quantized activations and weights with the exact one, on tokens of all records. It
goes along beta = 1 - alpha first, then along beta alone; 21 points each. With one exponent given, only the other is
searched (reference: both; spec: outlier suppression).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quant_core.arithmetic.numerics import Numerics
from quant_core.arithmetic.scales import LEVELS, QMIN, divided
from quant_core.processor import Exponent, StrictModel
from quant_core.smoothing.balance import balance
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.method import SmoothingConfig, SmoothingMethod
from quant_core.smoothing.product_errors import product_errors
from quant_core.smoothing.statistics import AllCalls, NoTokens, Tokens, TokenSample

_GRID = [step / 20 for step in range(21)]


class M6Config(StrictModel):
    """Exponents of activations and weights; one that is left out is searched."""

    alpha: Exponent | None = None
    beta: Exponent | None = None


class M6ProcessorConfig(SmoothingConfig):
    """Suppress outliers with independent exponents for activations and weights."""

    key: ClassVar[str] = "m6"
    cfg: M6Config = Field(default_factory=M6Config)


class Exponents(NamedTuple):
    """Exponents of the activations' and the weights' maxima."""

    alpha: float
    beta: float


def factor(group: MeasuredGroup, config: M6ProcessorConfig) -> Tensor:
    """Return `amax^alpha / wmax^beta`, (I,)."""
    return balance(group, *exponents(group, config))


def exponents(group: MeasuredGroup, config: M6ProcessorConfig) -> Exponents:
    """Return the given exponents, those that are missing searched."""
    alpha, beta = config.cfg.alpha, config.cfg.beta
    if alpha is not None and beta is not None:
        return Exponents(alpha, beta)
    if alpha is not None and not group.numerics.is_reference:
        return _best(group, [Exponents(alpha, beta) for beta in _GRID])
    if beta is not None and not group.numerics.is_reference:
        return _best(group, [Exponents(alpha, beta) for alpha in _GRID])
    first = _best(group, [Exponents(alpha, 1 - alpha) for alpha in _GRID])
    return _best(group, [first, *(Exponents(first.alpha, beta) for beta in _GRID)])


def _best(group: MeasuredGroup, candidates: Sequence[Exponents]) -> Exponents:
    """Return the candidate with the least error, of equals the last; the same on all ranks that share the factor."""
    factors = [_unbounded_factor(group, candidate) for candidate in candidates]
    found = _reference_squares if group.numerics.is_reference else _squares
    errors = group.total(found(group, factors))
    relative = (errors[:, 0] / errors[:, 1]).tolist()
    return candidates[max(range(len(candidates)), key=lambda index: (-relative[index], index))]


def _squares(group: MeasuredGroup, factors: Sequence[Tensor]) -> Tensor:
    """Return each candidate's squared error of the quantized product, and the square of the exact one, (C, 2)."""
    sums = torch.zeros(len(factors), 2, device=group.device)
    for x_NI, weights in group.samples():
        for found in product_errors(x_NI, weights, factors, group.codec, _quantized_activation):
            sums += torch.stack((found.errors, found.exact.expand_as(found.errors)), dim=1)
    return sums


def _reference_squares(group: MeasuredGroup, factors: Sequence[Tensor]) -> Tensor:
    """Return the same in the reference tool's arithmetic, on whole tensors: blocks would add up in another order."""
    sums = torch.zeros(len(factors), 2, device=group.device)
    for x_NI, weights in group.samples():
        wanted = [F.linear(x_NI, w_OI).to(torch.float32) for w_OI in weights]
        for index, factor_I in enumerate(factors):
            x_quantized_NI = _quantized_activation(x_NI / factor_I)
            for w_OI, exact in zip(weights, wanted):
                product = F.linear(x_quantized_NI, group.codec.round_trip(w_OI * factor_I)).to(torch.float32)
                sums[index] += torch.stack(((product - exact).square().sum(), exact.square().sum()))
    return sums


def _unbounded_factor(group: MeasuredGroup, candidate: Exponents) -> Tensor:
    if group.numerics.is_reference:
        return group.amax_I.pow(candidate.alpha) * group.wmax_I.pow(-candidate.beta)
    # A channel that never carries anything would divide by zero; the factor in use is bounded in the same way.
    return balance(group, *candidate)


def _quantized_activation(x_NI: Tensor) -> Tensor:
    """Quantize between the extremes: nothing lies outside, so nothing is clamped."""
    low, high = x_NI.aminmax()
    scale = divided(high - low, LEVELS)
    offset = torch.round(-low / scale) + QMIN
    return (torch.round(x_NI / scale + offset) - offset) * scale


def _tokens(config: M6ProcessorConfig, numerics: Numerics, channels: int) -> Tokens:
    if config.cfg.alpha is not None and config.cfg.beta is not None:
        return NoTokens()
    return AllCalls() if numerics.is_reference else TokenSample(channels)


METHOD = SmoothingMethod(M6ProcessorConfig, _tokens, factor)
