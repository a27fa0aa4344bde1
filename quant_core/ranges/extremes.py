"""`minmax`: ranges that come from the extremes of each call alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant_core.parallel.groups import Reduction


class Extremes:
    """`minmax`: the true minimum and maximum over all calls."""

    reductions: ClassVar[Mapping[str, Reduction]] = {"low": "min", "high": "max"}

    def __init__(self) -> None:
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Widen the range to contain this call's."""
        self.low = torch.minimum(self.low.to(low), low)
        self.high = torch.maximum(self.high.to(high), high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the extremes."""
        return self.low, self.high


class ChannelExtremes(Extremes):
    """The true minimum and maximum of each input channel over all calls, (I,): what smoothing can still divide."""

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Widen the range of each channel to contain this call's."""
        super().update(x, *x.detach().reshape(-1, x.shape[-1]).aminmax(dim=0))

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the extremes of all channels."""
        return self.low.amin(), self.high.amax()


class MeanExtremes:
    """`minmax` of the reference tool: the mean over calls of each call's minimum and maximum, in the model's dtype.

    It is a running mean over one sequence, so it declares no reduction: it exists to be compared with, in one process.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {}

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Append this call's extremes."""
        self.lows.append(low)
        self.highs.append(high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the means."""
        return torch.stack(self.lows).mean(), torch.stack(self.highs).mean()
