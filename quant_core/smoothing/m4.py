"""m4: the balance of activation and weight maxima with one exponent (SmoothQuant)."""

from __future__ import annotations

from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.session.config import M4ProcessorConfig
from quant_core.smoothing.balance import balance
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.method import SmoothingMethod
from quant_core.smoothing.statistics import NoTokens, Tokens


def factor(group: MeasuredGroup, config: M4ProcessorConfig) -> Tensor:
    """Return `amax^alpha / wmax^(1 - alpha)`, (I,); alpha is the model's own when the configuration has none."""
    alpha = group.alpha if config.alpha is None else config.alpha
    return balance(group, alpha, 1 - alpha)


def _tokens(config: M4ProcessorConfig, numerics: Numerics, channels: int) -> Tokens:
    return NoTokens()


METHOD = SmoothingMethod(M4ProcessorConfig.key, _tokens, factor)
