"""What an estimator of a static activation range is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from quant_core.parallel.groups import Reduction


class RangeEstimator(Protocol):
    """Gather calls and answer with the range to quantize in.

    `reductions` names the state tensors (attributes) and how ranks combine them; a fresh estimator is the neutral
    element of that combination, and the order of calls and ranks does not matter.
    """

    reductions: ClassVar[Mapping[str, Reduction]]

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in one call: its input x of any shape, and the extremes (scalars) of that call."""
        ...

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the estimated low and high end, scalars."""
        ...
