"""Turn ranges into scales, and numbers into 8-bit codes and back.

Legend of suffixes: O out features, I in features, N tokens, T timesteps: `w_OI`, `weight_scale_O1`, `deq_scale_TO`.
Every function computes in the dtype it is given; who wants float32 arithmetic passes float32.

An 8-bit code is one of 256 evenly spaced points. A *symmetric* range puts code 0 at 0.0 and gives up code -128; an
*asymmetric* range puts its two ends at -128 and 127, and the code of 0.0 is the offset.

Worked example: activations in [-1, 3]. Asymmetric: scale (3 + 1) / 255 = 0.015686, offset round(1 / 0.015686) - 128 =
64 - 128 = -64; 0.0 becomes -64, 3.0 becomes round(191.25) - 64 = 127. Symmetric: scale 3 / 127 = 0.0236, so a step is
one and a half times as wide and the codes below -43 are never used. Weights are near symmetric around 0 and a matrix
product with an offset on both sides would cost a correction per token, so weights are symmetric, static activations
asymmetric, and the correction for the offset is a constant per output: `quant_bias` (spec: scales).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.arithmetic.blocks import changed_in_blocks

QMIN, QMAX = -128, 127
LEVELS = 255
# float32's own resolution: a range narrower than this is a constant, and its scale only has to be no zero.
EPS = 2.0**-23


def divided(x: Tensor, number: int) -> Tensor:
    """Return x / number, rounded as a division is: by a plain number, CUDA would multiply with its reciprocal."""
    return x / torch.full_like(x, number)


def symmetric_scale(amax: Tensor) -> Tensor:
    """Return the scale that puts +-amax at +-127, at least EPS. amax: any shape, not negative."""
    return torch.maximum(divided(amax, QMAX), torch.full_like(amax, EPS))


def asymmetric_scale(low: Tensor, high: Tensor) -> Tensor:
    """Return the step of 255 that reach from min(low, 0) to max(high, 0), at least EPS."""
    low, high = include_zero(low, high)
    return torch.maximum(divided(high - low, LEVELS), torch.full_like(low, EPS))


def asymmetric_offset(low: Tensor, scale: Tensor) -> Tensor:
    """Return the code of 0.0: an integer in the dtype of `scale`; low: the lower end of the range."""
    return torch.round(low.clamp(max=0) * -1 / scale) + QMIN


def reaching(scale: Tensor, span: Tensor, steps: float) -> Tensor:
    """Return the stored scale, one unit larger where so many of its steps do not reach over the span.

    Half a step behind the last code is reached, too. Only a subnormal can be rounded that far down: in float16 that of
    a row whose absmax is below 0.001, or of an activation whose range is.
    """
    unit = torch.finfo(scale.dtype).smallest_normal * torch.finfo(scale.dtype).eps
    falls_short = scale.to(torch.float32) * steps < span.to(torch.float32)
    return torch.where(falls_short, scale + unit, scale)


def include_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Widen a range to contain 0, which every code book must represent exactly (padding, dropped tokens)."""
    return low.clamp(max=0), high.clamp(min=0)


def quantize(x: Tensor, scale: Tensor, offset: Tensor | float = 0.0, *, qmin: int = QMIN) -> Tensor:
    """Return the codes of x as whole numbers in x's dtype: clamp(round_half_even(x / scale + offset))."""
    return (x / scale).add_(offset).round_().clamp_(qmin, QMAX)


def fake_quantize_(x: Tensor, scale: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Replace x by what its codes stand for, and return it."""
    return x.div_(scale).add_(offset).round_().clamp_(QMIN, QMAX).sub_(offset).mul_(scale)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Return x as a runtime that quantizes each token symmetrically sees it; (..., I), computed in float32."""

    def change(block_RI: Tensor) -> None:
        amax_R1 = torch.maximum(block_RI.amax(dim=-1, keepdim=True), -block_RI.amin(dim=-1, keepdim=True))
        fake_quantize_(block_RI, symmetric_scale(amax_R1))

    return changed_in_blocks(x, torch.float32, change)


def packed_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the consumer reads `deq_scale` for a model of this dtype."""
    return torch.float32 if model_dtype == torch.bfloat16 else torch.int64


def pack_deq_scale(deq_scale: Tensor, model_dtype: torch.dtype) -> Tensor:
    """Return `deq_scale` in the form the consumer reads for a model of this dtype, same shape.

    deq_scale: float32. bf16 models read it as float32; all others as int64 whose low 32 bits are the float32's
    bits, the form the half-precision matrix product takes (spec: static activations).
    """
    if packed_dtype(model_dtype) == torch.float32:
        return deq_scale.contiguous()
    return deq_scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def unpack_deq_scale(stored: Tensor) -> Tensor:
    """Return the float32 scales from either stored form, same shape."""
    if stored.dtype == torch.float32:
        return stored
    return (stored & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
