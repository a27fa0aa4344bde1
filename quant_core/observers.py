"""Estimate the range of a static activation from the calls that calibration makes.

An estimator sees every call of one layer (in one timestep, if ranges are per step) and answers with a range. What it
has gathered is a few tensors, and it *declares* how each of them combines over ranks, so that data-parallel ranks
that saw other prompts and tensor-parallel ranks that saw other channels end with the same range as one rank would.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from quant_core.numerics import Numerics
from quant_core.timestep import TimestepManager

Reduction = Literal["min", "max", "sum"]
SyncRange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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


ESTIMATORS: Mapping[str, Mapping[str, Callable[[], RangeEstimator]]] = {
    "float32": {"minmax": Extremes},
    "reference": {"minmax": MeanExtremes},
}


class InputObserver:
    """Watch the input of one layer during the replay, and fake-quantize it for the layers behind.

    With `per_step` it keeps a range for each denoising step, read from `TimestepManager`; otherwise one range, under
    the key None. A numerics that carries its range keeps one estimator through all steps and remembers where it stood
    at the end of each.
    """

    def __init__(
        self, numerics: Numerics, new_estimator: Callable[[], RangeEstimator], *, per_step: bool, sync: SyncRange
    ) -> None:
        self.calls: Counter[int | None] = Counter()
        self._estimators: defaultdict[int | None, RangeEstimator] = defaultdict(new_estimator)
        self._carried: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._numerics, self._per_step, self._sync = numerics, per_step, sync

    def observe(self, x: Tensor) -> Tensor:
        """Take in one call's input (any shape) and return it fake-quantized."""
        step = TimestepManager.get_timestep_idx() if self._per_step else None
        self.calls[step] += 1
        low, high = self._sync(*x.aminmax())
        estimator = self._estimators[None if self._numerics.carries_range else step]
        estimator.update(x, low, high)
        if self._numerics.carries_range:
            low, high = self._carried[step] = estimator.range()
        return self._numerics.fake_quantize_input(x, low, high)

    def range(self, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the range of a step, or the one range."""
        return self._carried[step] if self._carried else self._estimators[step].range()

    def state(self, step: int | None = None) -> Iterator[tuple[Reduction, Tensor, Callable[[Tensor], None]]]:
        """Yield each state tensor of a step's estimator with its reduction and where the reduced one goes."""
        estimator = self._estimators[step]
        for name, op in estimator.reductions.items():
            yield op, getattr(estimator, name), partial(setattr, estimator, name)
