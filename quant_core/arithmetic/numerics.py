"""Two ways to compute the same tensors: `float32`, the better one, and `reference`, equal to the reference tool.

Both write the same names, dtypes and shapes but where it is said below. `is_reference` tells which it is:

    weights       float32 rounds the scale once to the stored dtype and takes the codes from that stored scale;
                  reference does every step in the model's dtype
    smoothing     float32 divides weights by the rounded `mul_scale`, and its searches see samples of all records;
                  reference rounds factor and inverse apart, m3 sees the first record, m6 all inputs at once
    ranges        float32 keeps the true extremes, and its scales reach them; reference the running mean of each
                  call's extremes, which clips
    deq_scale     float32 multiplies the stored scales in float32; reference rounds the product to the model's dtype
    replay        float32 fake-quantizes a call with that call's own range, so no result depends on the order or
                  the distribution of the records; reference with the range known so far, in one sequence
    bias          float32 widens the scales of rows whose bias has no room in int32; reference lets it overflow,
                  and becomes what the processor's cast makes of it
    attention     float32 has a scale per head; reference per token position, which is another shape
    buffers       float32 writes persistent buffers; reference leaves them out, so those names are missing

Worked example, bf16: a row with absmax 1.0 has the scale 1/127 = 0.0078740, stored in bf16 as 0.0078735. A weight of
0.326172 is 41.43 steps, code 41. In bf16 arithmetic the quotient has eight bits and becomes 41.5, which half-to-even
rounds to 42. One code in thirteen changes like that (spec: two numerics).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant_core.arithmetic.blocks import changed_in_blocks
from quant_core.arithmetic.integer_product import integer_product
from quant_core.arithmetic.scales import (
    LEVELS,
    QMAX,
    QMIN,
    asymmetric_offset,
    asymmetric_scale,
    fake_quantize_,
    include_zero,
    reaching,
)

_INT32 = torch.iinfo(torch.int32)
# Units of the integer product that a bias may take: half of int32. The rest is for the product less the offset's share,
# at most 255 * 127 for each input channel, and for the share itself, which is half of that.
_BIAS_ROOM = 2**30
# As many rows of ones as products of one row are not treated apart for.
_ONES = 16


@dataclass(frozen=True)
class Numerics:
    """Compute scales, codes and corrections of one layer, in one of the two ways."""

    name: Literal["float32", "reference"]

    @property
    def is_reference(self) -> bool:
        """Whether the tensors have to equal the reference tool's."""
        return self.name == "reference"

    def split_factor(self, factor_I: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what a smoothing factor multiplies weight columns with, and `mul_scale` in `dtype`, which undoes it.

        The better numerics rounds `mul_scale` first and gives the weight the inverse of that very value.
        """
        if self.is_reference:
            factor_I = factor_I.to(dtype)
            return factor_I, torch.ones_like(factor_I) / factor_I
        finite = torch.finfo(dtype)
        mul_scale_I = (1 / factor_I.to(torch.float32)).clamp(finite.tiny, finite.max).to(dtype)
        return 1 / mul_scale_I.to(torch.float32), mul_scale_I

    def working(self, x: Tensor) -> Tensor:
        """Return x in the precision that this numerics computes in."""
        return x.to(self._compute_dtype(x))

    def input_scale(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scale and offset of a static activation, both (1,) in `dtype`; low, high: ends of its range."""
        compute = self._compute_dtype(low)
        low, high = low.reshape(1).to(compute), high.reshape(1).to(compute)
        scale = asymmetric_scale(low, high).to(dtype)
        if not self.is_reference:
            first, last = include_zero(low, high)
            scale = reaching(scale, last - first, LEVELS + 1)
        offset = asymmetric_offset(low, scale.to(compute)).clamp(QMIN, QMAX)
        return scale, offset.to(dtype)

    def fake_quantize_input(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return x as the hardware would see it with the range [low, high]; any shape, dtype kept."""
        scale, offset = self.input_scale(low, high, x.dtype)
        compute = self._compute_dtype(x)
        scale, offset = scale.to(compute), offset.to(compute)
        return changed_in_blocks(x, compute, lambda block: fake_quantize_(block, scale, offset))

    def attention_rows(self, x_BHSD: Tensor) -> Tensor:
        """Return the values of q, k or v as rows that share a scale: (heads, values).

        The reference tool takes the token axis for the head axis, so its rows are the token positions.
        """
        if self.is_reference:
            return x_BHSD.transpose(1, 2).reshape(x_BHSD.shape[2], -1)
        return x_BHSD.transpose(0, 1).flatten(1)

    def deq_scale(self, input_scale_T1: Tensor, weight_scale_O1: Tensor) -> Tensor:
        """Return what one unit of the integer product stands for in each of T steps, (T, O) float32."""
        compute = self._compute_dtype(weight_scale_O1)
        return (input_scale_T1.to(compute) * weight_scale_O1.to(compute).squeeze(-1)).to(torch.float32)

    def least_weight_scale(self, bias_O: Tensor, input_scale_T1: Tensor) -> Tensor:
        """Return the scales (O, 1) of a weight's rows below which their bias has no room in the integer product.

        Worked example: a row of weights around 1e-5 has the scale 1.2e-7; inputs of 0.1 have the scale 4e-4. A bias
        of 1.0 would be 2.1e10 units of the product, ten times what int32 holds. With the scale 2.3e-6 it is 2^30.
        """
        unit = input_scale_T1.to(torch.float32).min() * _BIAS_ROOM
        return (bias_O.to(torch.float32).abs() / unit).unsqueeze(1)

    def quant_bias(self, bias_O: Tensor | None, deq_scale_TO: Tensor, codes_OI: Tensor, offset_T1: Tensor) -> Tensor:
        """Return the bias in units of the integer product, less the share of each step's offset, (T, O) int32."""
        # Row sums times an offset reach 2**31; float32 has 24 bits, so the better numerics counts in float64.
        exact = torch.float32 if self.is_reference else torch.float64
        deq_TO = deq_scale_TO.to(exact)
        bias_O = deq_TO.new_zeros(len(codes_OI)) if bias_O is None else bias_O.to(deq_TO)
        # A product with ones, many times as fast as a sum.
        ones = torch.ones(_ONES, codes_OI.shape[1], dtype=torch.int8, device=codes_OI.device)
        row_sums_O = integer_product(codes_OI, ones)[:, 0].to(exact)
        points_TO = torch.round(bias_O / deq_TO - row_sums_O * offset_T1.to(exact))
        return points_TO.clamp(_INT32.min, _INT32.max).to(torch.int32)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if self.is_reference else torch.float32


NUMERICS = {"float32": Numerics("float32"), "reference": Numerics("reference")}
