"""The channels of inputs before and after outlier suppression, as the numbers that SVG takes, where it mattered.

Places are shares of the page's width in percent, so that a drawing is as wide as its page and its text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.files.smoothed_inputs import InputSpread, Spread

# Half a bit of a common scale: below it a drawing shows nothing that anybody would act on.
MATTERS_BITS = 0.5
# As many rows as a screen holds; report.json has all.
SHOWN = 24
# The rest of the width is for the figure behind a bar.
WIDTH = 86.0
# Channels that carry nothing have no logarithm.
_LEAST = 1e-6


@dataclass(frozen=True)
class Bar:
    """From an input's channel in the middle to its largest one, on the chart's scale."""

    spread: Spread
    x: float
    width: float


@dataclass(frozen=True)
class Row:
    """One input and its bars."""

    input: InputSpread
    before: Bar
    after: Bar


@dataclass(frozen=True)
class SpreadChart:
    """The inputs where suppression mattered, the most first, on one scale of powers of ten.

    mattered, count: of so many inputs these gained half a bit or more; best: what the best one gained.
    """

    rows: Sequence[Row]
    ticks: Sequence[tuple[float, str]]
    mattered: int
    count: int
    best: float

    @property
    def summary(self) -> str:
        """Say in how many inputs it mattered, and which of them are shown."""
        middle, all_inputs = "the channel in the middle", f"of {self.count} inputs"
        if not self.mattered:
            return f"In none {all_inputs} did {middle} gain half a bit against the largest: {self.best:.2f} at most."
        shown = f"; these {len(self.rows)} gained most" if self.mattered > len(self.rows) else ""
        return f"In {self.mattered} {all_inputs} {middle} gained half a bit or more against the largest{shown}."


def spread_chart(inputs: Sequence[InputSpread]) -> SpreadChart | None:
    """Return the chart; None where nothing was divided, or nobody noted it."""
    if not inputs:
        return None
    by_gain = sorted(inputs, key=lambda each: -each.bits)
    mattered = [each for each in by_gain if each.bits >= MATTERS_BITS]
    shown = mattered[:SHOWN]
    ends = [_exponent(end) for each in shown for s in (each.before, each.after) for end in (s.middle, s.largest)]
    low, high = math.floor(min(ends, default=0)), math.ceil(max(ends, default=1))
    scale = WIDTH / max(1, high - low)

    def bar(spread: Spread) -> Bar:
        x, end = (scale * (_exponent(value) - low) for value in (spread.middle, spread.largest))
        return Bar(spread, round(x, 1), round(end - x, 1))

    rows = [Row(each, bar(each.before), bar(each.after)) for each in shown]
    return SpreadChart(rows, list(_ticks(low, high, scale)), len(mattered), len(inputs), by_gain[0].bits)


def _exponent(value: float) -> float:
    return math.log10(max(value, _LEAST))


def _ticks(low: int, high: int, scale: float) -> Iterator[tuple[float, str]]:
    for power in range(low, max(high, low + 1) + 1):
        yield round(scale * (power - low), 1), f"{10.0**power:g}"
