"""Estimate the range of a static activation from the calls that calibration makes.

An estimator sees every call of one layer (in one timestep, if ranges are per step) and answers with a range. What it
has gathered is a few tensors, and it *declares* how each of them combines over ranks, so that data-parallel ranks
that saw other prompts and tensor-parallel ranks that saw other channels end with the same range as one rank would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from quant_core.estimators.clipped import ClippedRange
from quant_core.estimators.estimator import RangeEstimator
from quant_core.estimators.extremes import Extremes, MeanExtremes
from quant_core.estimators.histogram import histogram_range
from quant_core.estimators.mix import mix_range
from quant_core.estimators.mse import mse_range
from quant_core.estimators.percentile import percentile_range

# numerics -> act_method -> what makes a fresh estimator
ESTIMATORS: Mapping[str, Mapping[str, Callable[[], RangeEstimator]]] = {
    "float32": {
        "minmax": Extremes,
        "histogram": partial(ClippedRange, histogram_range),
        "mix": partial(ClippedRange, mix_range),
        "percentile": partial(ClippedRange, percentile_range),
        "mse": partial(ClippedRange, mse_range),
    },
    "reference": {"minmax": MeanExtremes},
}
