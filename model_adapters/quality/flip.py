"""FLIP: the difference that an eye notices between two pictures that take turns on a screen. 0 is none, 1 the most.

Source: Andersson, Nilsson, Akenine-Möller, Oskarsson, Åström, Fairchild: FLIP: A Difference Evaluator for Alternating
Images, Proceedings of the ACM on Computer Graphics and Interactive Techniques 3(2), 2020. Numbers below are the
paper's; its observer sees 67 pixels a degree (a 0.7 m wide screen of 3840 pixels from 0.7 m).

    colour    blur each opponent channel as the eye does, then measure the distance in a colour space that is even to
              the eye (HyAB in CIELAB, chroma reduced in the dark), compressed to [0, 1]
    feature   where edges and points of the lightness differ
    FLIP      colour ^ (1 - feature), the mean over all pixels

It is written here and not a dependency because the public package has no wheel for the processors beside an NPU.
For orientation: PSNR 54, 40 and 26 dB correspond to about 0.010, 0.032 and 0.108.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model_adapters.quality.planes import filtered, pair

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180


class _Bell(NamedTuple):
    """One Gaussian of a contrast sensitivity: amplitude and width (degrees squared, times pi squared)."""

    amplitude: float
    width: float


# By opponent channel: luminance, red against green, blue against yellow.
_SENSITIVITY = ((_Bell(1.0, 0.0047),), (_Bell(1.0, 0.0053),), (_Bell(34.1, 0.04), _Bell(13.5, 0.025)))
_BLUR_RADIUS = math.ceil(3 * math.sqrt(0.04 / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
_FEATURE_DEGREES = 0.082
_COLOUR_EXPONENT, _FEATURE_EXPONENT = 0.7, 0.5
# Differences up to 0.4 of the largest are spread over 95 % of the scale.
_KNEE, _KNEE_VALUE = 0.4, 0.95

# Linear RGB (sRGB's primaries) to XYZ; white is RGB (1, 1, 1).
_XYZ_OF_RGB = torch.tensor(
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ],
    dtype=torch.float64,
)
_RGB_OF_XYZ = torch.linalg.inv(_XYZ_OF_RGB)
_WHITE = _XYZ_OF_RGB.sum(dim=1).view(3, 1, 1)


def flip(reference: Any, test: Any) -> float:
    """Return the mean FLIP of two pictures (H, W, 3), uint8 or floating in [0, 1]."""
    return flip_map(reference, test).mean().item()


def flip_map(reference: Any, test: Any) -> Tensor:
    """Return FLIP of each pixel (H, W), float64."""
    first, second = (_opponent(_linear(planes)) for planes in pair(reference, test))
    return _colour_difference(first, second) ** (1 - _feature_difference(first[0], second[0]))


def _colour_difference(first: Tensor, second: Tensor) -> Tensor:
    most = _distance(_even(torch.eye(3, dtype=torch.float64)[1]), _even(torch.eye(3, dtype=torch.float64)[2]))
    most = most**_COLOUR_EXPONENT
    seen_1, seen_2 = (_even(_rgb_of_opponent(_as_seen(planes)).clamp(0, 1)) for planes in (first, second))
    distance = _distance(seen_1, seen_2) ** _COLOUR_EXPONENT
    knee = _KNEE * most
    below = distance * (_KNEE_VALUE / knee)
    above = _KNEE_VALUE + (distance - knee) / (most - knee) * (1 - _KNEE_VALUE)
    return torch.where(distance < knee, below, above)


def _feature_difference(luminance_1: Tensor, luminance_2: Tensor) -> Tensor:
    found = [[_strength(luminance, order) for order in (1, 2)] for luminance in (luminance_1, luminance_2)]
    edges, points = ((one - other).abs() for one, other in zip(*found))
    return (torch.maximum(edges, points) / math.sqrt(2)) ** _FEATURE_EXPONENT


def _strength(luminance: Tensor, order: int) -> Tensor:
    """Return how strong edges (first derivative) or points (second) are in a lightness (H, W)."""
    deviation = 0.5 * _FEATURE_DEGREES * PIXELS_PER_DEGREE
    place = _places(math.ceil(3 * deviation))
    bell = torch.exp(-(place**2) / (2 * deviation**2))
    slope = -place * bell if order == 1 else (place**2 / deviation**2 - 1) * bell
    smooth = bell / bell.sum()
    rising, falling = slope.clamp(min=0), slope.clamp(max=0)
    slope = rising / rising.sum() - falling / falling.sum()
    lightness = (luminance + 16) / 116
    across, down = _filtered(lightness, smooth, slope), _filtered(lightness, slope, smooth)
    return torch.sqrt(across**2 + down**2)


def _as_seen(opponent: Tensor) -> Tensor:
    """Blur each opponent channel as the eye does at this distance."""
    return torch.stack([_blurred(plane, bells) for plane, bells in zip(opponent, _SENSITIVITY)])


def _blurred(plane: Tensor, bells: Sequence[_Bell]) -> Tensor:
    degrees = _places(_BLUR_RADIUS) / PIXELS_PER_DEGREE
    curves = [torch.exp(-(math.pi**2) * degrees**2 / bell.width) for bell in bells]
    heights = [bell.amplitude * math.sqrt(math.pi / bell.width) for bell in bells]
    volume = sum(height * curve.sum() ** 2 for height, curve in zip(heights, curves))
    parts = [_filtered(plane, curve, curve) * (height / volume) for height, curve in zip(heights, curves)]
    return torch.stack(parts).sum(dim=0)


def _filtered(plane: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Filter (H, W) and keep its size: the border is repeated outwards."""
    radius = len(down) // 2
    padded = F.pad(plane[None, None], (radius,) * 4, mode="replicate")[0, 0]
    return filtered(padded, down, across)


def _places(radius: int) -> Tensor:
    return torch.arange(-radius, radius + 1, dtype=torch.float64)


def _linear(srgb: Tensor) -> Tensor:
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _xyz(rgb: Tensor) -> Tensor:
    """Return XYZ over that of white, (3, H, W)."""
    return torch.einsum("ij,jhw->ihw", _XYZ_OF_RGB, rgb) / _WHITE


def _opponent(rgb: Tensor) -> Tensor:
    """Return luminance, red-green and blue-yellow: CIELAB without its root, so that blurring adds up light."""
    x, y, z = _xyz(rgb)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _rgb_of_opponent(opponent: Tensor) -> Tensor:
    y = (opponent[0] + 16) / 116
    xyz = torch.stack([y + opponent[1] / 500, y, y - opponent[2] / 200])
    return torch.einsum("ij,jhw->ihw", _RGB_OF_XYZ, xyz * _WHITE)


def _even(rgb: Tensor) -> Tensor:
    """Return CIELAB with its chroma scaled by the lightness (Hunt: colours fade in the dark); (3, H, W) or (3,)."""
    xyz = _xyz(rgb.reshape(3, *(rgb.shape[1:] or (1, 1))))
    edge = 6 / 29
    x, y, z = torch.where(xyz > edge**3, xyz.clamp(min=0) ** (1 / 3), xyz / (3 * edge**2) + 4 / 29)
    lightness = 116 * y - 16
    return torch.stack([lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)])


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Return HyAB: lightness and chroma differences added up."""
    lightness, red_green, blue_yellow = (first - second).abs()
    return lightness + torch.hypot(red_green, blue_yellow)
