"""`mix`: half way between the extremes and the range of `histogram`, for who trusts neither alone."""

from __future__ import annotations

from quant_core.ranges.histogram import histogram_range
from quant_core.ranges.value_histogram import Distribution


def mix_range(values: Distribution) -> tuple[float, float]:
    """Return the mean of the two ranges, end by end."""
    low, high = histogram_range(values)
    return (low + values.low) / 2, (high + values.high) / 2
