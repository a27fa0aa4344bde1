"""One group as a smoothing method sees it: its weights, the statistics of its inputs, and who shares its factor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.arithmetic.weight_codec import Int8Rows
from quant_core.parallel.groups import Group, reduce_over
from quant_core.smoothing.statistics import InputStatistics


class SharedInput(NamedTuple):
    """Hold the weights (O, I) of the linears that read one input, in the model's dtype, and the input's statistics."""

    weights: tuple[Tensor, ...]
    statistics: InputStatistics


@dataclass(frozen=True)
class MeasuredGroup:
    """Answer a method's questions about a group.

    codec: how the weights will become codes. alpha, floor: the model's own for m4, and the least factor. tp_group:
    ranks that must come to the same factor, because they hold other rows of the same layers.
    """

    inputs: Sequence[SharedInput]
    numerics: Numerics
    codec: Int8Rows
    alpha: float
    floor: float
    tp_group: Group | None = None

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.inputs[0].weights[0].device

    @cached_property
    def amax_I(self) -> Tensor:
        """Return the largest |x| of each channel, in the working precision."""
        each = [shared.statistics.amax_I.to(self.device) for shared in self.inputs]
        return self.numerics.working(torch.stack(each).amax(0))

    @cached_property
    def wmax_I(self) -> Tensor:
        """Return the largest |w| of each column over all rows of all linears on all ranks, in the working precision."""
        each = [weight.abs().amax(0) for shared in self.inputs for weight in shared.weights]
        return self.numerics.working(reduce_over(self.tp_group, "max", torch.stack(each).amax(0)))

    @cached_property
    def mean_I(self) -> Tensor:
        """Return the mean |x| of each channel, in the working precision."""
        each = [shared.statistics.tokens.mean_abs().to(self.device) for shared in self.inputs]
        return self.numerics.working(torch.stack(each).mean(0) if len(each) > 1 else each[0])

    def samples(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield each input's kept tokens (N, I) in the working precision, and the weights (O, I) that read them."""
        for shared in self.inputs:
            if kept := shared.statistics.tokens.rows():
                yield self.numerics.working(torch.cat(kept).to(self.device)), shared.weights

    def total(self, losses: Tensor) -> Tensor:
        """Return losses summed over the ranks that must choose alike; any shape, every rank the same."""
        return reduce_over(self.tp_group, "sum", losses)
