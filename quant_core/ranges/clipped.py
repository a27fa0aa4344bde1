"""An estimator that counts values and lets a rule choose the range from the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant_core.parallel.groups import Reduction
from quant_core.ranges.value_histogram import BINS, Distribution, count_values, distribution

# A rule answers with the low and high end.
Rule = Callable[[Distribution], tuple[float, float]]


class ClippedRange:
    """Count every call's values, and clip where the rule says, never outside the true extremes.

    importance_I: as how many a value of each input channel counts; alike when None.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"low": "min", "high": "max", "counts": "sum"}

    def __init__(self, rule: Rule, importance_I: Tensor | None = None) -> None:
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self._rule, self._importance_I = rule, importance_I

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Count this call's values, and widen the extremes to contain its own."""
        self.low = torch.minimum(self.low.to(low), low)
        self.high = torch.maximum(self.high.to(high), high)
        self.counts = self.counts.to(x.device) + count_values(x, self._importance_I)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the rule's range, in float32 whatever the dtype of the calls."""
        low, high = self._rule(distribution(self.counts, self.low, self.high))
        lowest, highest = self.low.float(), self.high.float()
        return lowest.new_tensor(low).clamp(lowest, highest), highest.new_tensor(high).clamp(lowest, highest)
