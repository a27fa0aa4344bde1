"""Watch the input of a layer while the calibration records are replayed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.calibration.timestep import TimestepManager
from quant_core.parallel.groups import Group, Reduction, reduce_over
from quant_core.ranges.estimator import RangeEstimator


class InputObserver:
    """Watch the input of one layer, and in a replay fake-quantize it for the layers behind.

    With `per_step` it keeps a range for each denoising step, read from `TimestepManager`; otherwise one range, under
    the key None. The reference numerics keeps one estimator through all steps and remembers where it stood at the end
    of each. In a replay the ranks of `scale_group` take one call's extremes over all of them.
    """

    def __init__(
        self,
        numerics: Numerics,
        new_estimator: Callable[[], RangeEstimator],
        *,
        per_step: bool,
        scale_group: Group | None = None,
    ) -> None:
        self.calls: Counter[int | None] = Counter()
        self._estimators: defaultdict[int | None, RangeEstimator] = defaultdict(new_estimator)
        self._carried: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._numerics, self._per_step, self._scale_group = numerics, per_step, scale_group

    def observe(self, x: Tensor) -> Tensor:
        """Take in one call's input (any shape) and return it fake-quantized."""
        return self._numerics.fake_quantize_input(x, *self.measure(x))

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one call's input (any shape) and return the range to quantize it in."""
        step = TimestepManager.get_timestep_idx() if self._per_step else None
        self.calls[step] += 1
        low, high = x.aminmax()
        if self._scale_group is not None:
            neg_low, high = reduce_over(self._scale_group, "max", torch.stack((-low, high))).unbind()
            low = -neg_low
        estimator = self._estimators[None if self._numerics.is_reference else step]
        estimator.update(x, low, high)
        if self._numerics.is_reference:
            low, high = self._carried[step] = estimator.range()
        return low, high

    def range(self, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the range of a step, or the one range."""
        return self._carried[step] if self._carried else self._estimators[step].range()

    def state(self, step: int | None = None) -> Iterator[tuple[Reduction, Tensor, Callable[[Tensor], None]]]:
        """Yield each state tensor of a step's estimator with its reduction and where the reduced one goes."""
        estimator = self._estimators[step]
        for name, op in estimator.reductions.items():
            yield op, getattr(estimator, name), partial(setattr, estimator, name)

    def saved(self) -> dict[str, Any]:
        """Return all that it gathered as plain data: steps, calls in each, and each state tensor, a row a step."""
        steps = sorted(self.calls, key=lambda step: -1 if step is None else step)
        estimators = [self._estimators[step] for step in steps]
        names = estimators[0].reductions if estimators else ()
        state = {name: torch.stack([getattr(each, name).cpu() for each in estimators]) for name in names}
        return {"steps": steps, "calls": [self.calls[step] for step in steps], **state}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what another one has saved."""
        for row, (step, calls) in enumerate(zip(saved["steps"], saved["calls"])):
            self.calls[step] = calls
            estimator = self._estimators[step]
            for name in estimator.reductions:
                setattr(estimator, name, saved[name][row].clone())
