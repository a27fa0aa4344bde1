"""Signal over quantization noise, as sums that add up over calls, records and ranks.

    SQNR = 10 log10( sum of exact² / sum of (exact - approximate)² )    in decibels

Sums are kept, not decibels: those of two ranks add up to what one rank would have measured on all records. A tensor is
summed up row by row in float32 on its device, because not every device knows float64, and the rows in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Stands for "no difference at all" (and its negative for NaN or infinity in the approximation): more than any pair of
# float32 tensors or pictures that differ anywhere can show, and a number that JSON has.
LIMIT_DB = 150.0


@dataclass(frozen=True)
class Ratio:
    """Hold the two sums of squares."""

    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: Ratio) -> Ratio:
        """Return the ratio over both."""
        return Ratio(self.signal + other.signal, self.noise + other.noise)

    @property
    def decibels(self) -> float:
        """Return the ratio in dB, within plus and minus LIMIT_DB."""
        if not (math.isfinite(self.noise) and math.isfinite(self.signal)):
            return -LIMIT_DB
        if self.noise == 0.0:
            return LIMIT_DB
        if self.signal == 0.0:
            return -LIMIT_DB
        return max(-LIMIT_DB, min(LIMIT_DB, 10 * math.log10(self.signal / self.noise)))

    @property
    def relative_error(self) -> float:
        """Return the error's length over the signal's: 0.1 is 20 dB."""
        return 10 ** (-self.decibels / 20)


def compare(exact: Tensor, approximate: Tensor) -> Ratio:
    """Return the ratio of one pair of tensors, both (..., features)."""
    return compare_each(exact, [approximate])[0]


def compare_each(exact: Tensor, approximates: Iterable[Tensor]) -> list[Ratio]:
    """Return the ratio of each of several approximations, of which one is held at a time; the device is read once."""
    import torch

    exact = exact.float()
    rows = [_of_rows(exact), *(_of_rows(exact - approximate.float()) for approximate in approximates)]
    signal, *noises = (part.sum().item() for part in torch.stack(rows).cpu().double())
    return [Ratio(signal, noise) for noise in noises]


def total(ratios: Iterable[Ratio]) -> Ratio:
    """Return the ratio over all of them, whatever their order."""
    found = list(ratios)
    return Ratio(math.fsum(ratio.signal for ratio in found), math.fsum(ratio.noise for ratio in found))


@dataclass
class StepRatios:
    """Add up ratios by denoising step; the key is None where the step is unknown."""

    by_step: dict[int | None, Ratio] = field(default_factory=dict)

    def add(self, step: int | None, ratio: Ratio) -> None:
        """Take in what was measured in a step."""
        self.by_step[step] = self.by_step.get(step, Ratio()) + ratio

    def update(self, other: StepRatios) -> None:
        """Take in what another rank measured."""
        for step, ratio in other.by_step.items():
            self.add(step, ratio)

    @property
    def overall(self) -> Ratio:
        """Return the ratio over all steps."""
        return total(self.by_step.values())

    def steps(self) -> dict[int, Ratio]:
        """Return the ratios of the known steps, in their order."""
        return {step: self.by_step[step] for step in sorted(step for step in self.by_step if step is not None)}


def _of_rows(values: Tensor) -> Tensor:
    return values.square().sum(dim=-1)
