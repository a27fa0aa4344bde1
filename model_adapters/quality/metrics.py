"""How alike two pictures are, by three measures; pictures are (H, W, 3), uint8 or floating in [0, 1].

PSNR   10 log10(1 / mean squared error), in dB: of one seed 20 is the least that is accepted, 30 is recommended
SSIM   Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment: From Error Visibility to Structural Similarity,
       IEEE Transactions on Image Processing 13(4), 2004. A Gaussian window of 11 x 11 with deviation 1.5 where it
       fits, K1 = 0.01, K2 = 0.03; the mean over places and colour channels.
FLIP   what an eye notices when the pictures are flipped on a screen (`flip`)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model_adapters.quality.card import Similarity
from model_adapters.quality.flip import flip
from model_adapters.quality.planes import filtered, pair
from quant_core.errors import InputError
from quant_core.quality.ratio import LIMIT_DB

_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def similarity(reference: Any, test: Any) -> Similarity:
    """Return all three measures of a pair. Raises InputError for what is no pair of pictures."""
    return Similarity(psnr=psnr(reference, test), ssim=ssim(reference, test), flip=flip(reference, test))


def psnr(reference: Any, test: Any) -> float:
    """Return the peak signal-to-noise ratio in dB; LIMIT_DB for equal pictures."""
    first, second = pair(reference, test)
    error = (first - second).square().mean().item()
    return min(LIMIT_DB, -10 * math.log10(error)) if error else LIMIT_DB


def ssim(reference: Any, test: Any) -> float:
    """Return the structural similarity, 1 for equal pictures. Raises InputError for pictures smaller than 11 x 11."""
    first, second = pair(reference, test)
    if min(first.shape[1:]) < _WINDOW:
        raise InputError(
            f"a picture of {first.shape[2]} x {first.shape[1]} pixels is too small for SSIM",
            where="comparing pictures",
            why=f"SSIM looks through a window of {_WINDOW} x {_WINDOW}",
            advice="compare larger pictures",
        )
    mean_1, mean_2 = _windowed(first), _windowed(second)
    variance_1 = _windowed(first * first) - mean_1**2
    variance_2 = _windowed(second * second) - mean_2**2
    covariance = _windowed(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + _C1) / (mean_1**2 + mean_2**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_1 + variance_2 + _C2)
    return (luminance * structure).mean().item()


def _windowed(planes: Tensor) -> Tensor:
    """Return the weighted mean of each whole window: (3, H, W) to (3, H - 10, W - 10)."""
    place = torch.arange(_WINDOW, dtype=planes.dtype) - _WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * _DEVIATION**2))
    weights = weights / weights.sum()
    return filtered(planes, weights, weights)
