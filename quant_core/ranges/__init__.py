"""Estimate the range of a static activation from the calls that calibration makes.

An estimator sees every call of one layer (in one timestep, if ranges are per step) and answers with a range. What it
has gathered is a few tensors, and it *declares* how each of them combines over ranks, so that data-parallel ranks
that saw other prompts and tensor-parallel ranks that saw other channels end with the same range as one rank would.

    minmax      1   the true extremes of all calls: nothing is clipped. The default
    histogram   2   shrink the extremes as long as that lowers the activation's error (PyTorch's HistogramObserver)
    mix         3   half way between the two
    percentile      the shortest range with 99.99 % of the values
    mse             the range with the least error of the layer's output: values count as their channel weighs

Signal to quantization noise in decibels, median layer / model output, through the deployed arithmetic; printed by
`python scripts/compare_estimators.py estimators`. SD3 as w8a8, FLUX as w8a8_timestep with all steps static. The golden
models have no outlier channels, the tiny pipelines have a few of 20 to 50 times the others' size, read by weights as
much smaller. `reference` is the running mean of the reference tool.

                golden sd3 fp32  golden flux fp32  golden sd3 bf16  golden flux bf16     tiny sd3       tiny flux
    reference     22.3 /  7.6       27.0 / 17.6      22.2 /  7.5       26.8 / 19.6      14.7 / 18.4    13.1 / 13.8
    minmax        34.6 / 12.7       37.1 / 28.6      34.6 / 12.3       37.0 / 25.8      13.2 / 16.8    13.3 / 13.7
    histogram     34.6 / 11.9       37.1 / 28.5      34.6 / 11.7       37.0 / 25.9      14.1 / 17.4    13.7 / 14.8
    mix           34.6 / 12.6       37.1 / 28.6      34.6 / 13.3       37.0 / 25.9      13.6 / 17.1    13.4 / 13.9
    percentile    34.4 / 12.5       37.0 / 28.5      34.4 / 12.5       37.0 / 25.9      15.1 / 18.3    14.8 / 16.6
    mse           34.5 / 12.7       37.1 / 29.4      34.6 / 12.9       36.9 / 26.0      21.7 / 24.9    20.0 / 19.4

In words: without outlier channels the extremes are as good as anything, and the reference's mean loses 10 dB by
clipping them. With outlier channels that nothing smooths, steps are too coarse for all others; then clipping, even by
accident, gains, and `mse` gains most, because it knows what each channel is worth. Smoothing gains more still.

These are random weights. What a trained model paints says the same of outlier channels and the contrary without them:
there rare large values matter, the layers look better for clipping them, and pictures get worse (`scripts/study.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from quant_core.ranges.clipped import ClippedRange
from quant_core.ranges.estimator import RangeEstimator
from quant_core.ranges.extremes import Extremes, MeanExtremes
from quant_core.ranges.histogram import histogram_range
from quant_core.ranges.mix import mix_range
from quant_core.ranges.mse import mse_range
from quant_core.ranges.percentile import percentile_range


@dataclass(frozen=True)
class EstimatorKind:
    """Say how a fresh estimator of one layer is made.

    fresh: takes the importance of the layer's input channels, (I,) int64, or None. weighs_channels: it wants it.
    """

    fresh: Callable[[Tensor | None], RangeEstimator]
    weighs_channels: bool = False


# numerics -> act_method -> kind
ESTIMATORS: Mapping[str, Mapping[str, EstimatorKind]] = {
    "float32": {
        "minmax": EstimatorKind(lambda _: Extremes()),
        "histogram": EstimatorKind(partial(ClippedRange, histogram_range)),
        "mix": EstimatorKind(partial(ClippedRange, mix_range)),
        "percentile": EstimatorKind(partial(ClippedRange, percentile_range)),
        "mse": EstimatorKind(partial(ClippedRange, mse_range), weighs_channels=True),
    },
    "reference": {"minmax": EstimatorKind(lambda _: MeanExtremes())},
}
