"""What an outlier suppression method is: which tokens it must see again, and how it chooses a factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.processor import ProcessorConfig
from quant_core.smoothing.groups import Selection
from quant_core.smoothing.measured_group import MeasuredGroup
from quant_core.smoothing.statistics import Tokens


class SmoothingConfig(ProcessorConfig):
    """Configure an outlier suppression.

    `smoothing_groups`: the model's default groups (its usual ones, or its optional ones where all those stay float),
    all of both, or every quantized layer (`every`). `fused`: let the linears in front absorb the factors, so that
    nothing is multiplied at run time.
    """

    kind: ClassVar[str] = "outlier suppression"
    smoothing_groups: Selection = "default"
    fused: bool = False


@dataclass(frozen=True)
class SmoothingMethod:
    """Describe a method by its configuration in the session.

    tokens: from the method's configuration and the numerics, what to keep of an input with that many channels.
    factor: from a measured group and the configuration, what divides the group's input, (I,).
    """

    config: type[SmoothingConfig]
    tokens: Callable[[Any, Numerics, int], Tokens]
    factor: Callable[[MeasuredGroup, Any], Tensor]
