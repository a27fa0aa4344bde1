"""m4: the balance of activation and weight maxima with one exponent (SmoothQuant)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.processor import Exponent
from quant_core.smoothing.balance import balance
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.method import SmoothingConfig, SmoothingMethod
from quant_core.smoothing.statistics import NoTokens, Tokens


class M4ProcessorConfig(SmoothingConfig):
    """Suppress outliers with the balance of activation and weight maxima (SmoothQuant).

    `alpha`: exponent of the activations; the model's own when left out.
    """

    key: ClassVar[str] = "m4"
    alpha: Exponent | None = None


def factor(group: MeasuredGroup, config: M4ProcessorConfig) -> Tensor:
    """Return `amax^alpha / wmax^(1 - alpha)`, (I,); alpha is the model's own when the configuration has none."""
    alpha = group.alpha if config.alpha is None else config.alpha
    return balance(group, alpha, 1 - alpha)


def _tokens(config: M4ProcessorConfig, numerics: Numerics, channels: int) -> Tokens:
    return NoTokens()


METHOD = SmoothingMethod(M4ProcessorConfig, _tokens, factor)
