"""Two pictures as planes of numbers, or the reason why they cannot be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_core.errors import InputError


def pair(reference: Any, test: Any) -> tuple[Tensor, Tensor]:
    """Return two pictures (H, W, 3), uint8 or floating in [0, 1], as (3, H, W) float64 in [0, 1].

    Raises InputError for arrays that are no pictures, and for pictures of two sizes.
    """
    first, second = _planes(reference), _planes(test)
    if first.shape != second.shape:
        raise InputError(
            f"pictures of {_size(first)} and {_size(second)} pixels cannot be compared",
            where="comparing pictures",
            why="both must show the same prompt and noise in one size",
            advice="make both with the same width and height",
        )
    return first, second


def _planes(picture: Any) -> Tensor:
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise InputError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture",
            where="comparing pictures",
            why="a picture is (height, width, 3), uint8 or floating in [0, 1]",
            advice="convert it to RGB first",
        )
    planes = torch.tensor(array, dtype=torch.float64).permute(2, 0, 1)
    return planes / 255 if array.dtype == np.uint8 else planes.clamp(0, 1)


def _size(planes: Tensor) -> str:
    return f"{planes.shape[2]} x {planes.shape[1]}"


def filtered(planes: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Filter (..., H, W) with a kernel for columns and one for rows, where both fit: (..., H - K + 1, W - K + 1).

    Shifted copies are added up, because torch's convolution is slow in float64: 0.2 s against 5 s for FLIP of 512².
    """
    return _along(_along(planes, across, -1), down, -2)


def _along(planes: Tensor, kernel: Tensor, dim: int) -> Tensor:
    length = planes.shape[dim] - len(kernel) + 1
    result = torch.zeros_like(planes.narrow(dim, 0, length))
    for place, weight in enumerate(kernel.tolist()):
        result.add_(planes.narrow(dim, place, length), alpha=weight)
    return result
