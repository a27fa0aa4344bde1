"""What an outlier suppression method is: which tokens it must see again, and how it chooses a factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.statistics import Tokens


@dataclass(frozen=True)
class SmoothingMethod:
    """Describe a method by its key in the session.

    tokens: from the method's configuration and the numerics, what to keep of an input with that many channels.
    factor: from a measured group and the configuration, what divides the group's input, (I,).
    """

    key: str
    tokens: Callable[[Any, Numerics, int], Tokens]
    factor: Callable[[MeasuredGroup, Any], Tensor]
