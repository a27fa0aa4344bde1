"""Codes stand for what was quantized, within half a step everywhere, and packed scales keep every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.scales import (
    EPS,
    QMAX,
    QMIN,
    asymmetric_offset,
    asymmetric_scale,
    include_zero,
    pack_deq_scale,
    quantize,
    symmetric_scale,
    unpack_deq_scale,
)
from quant_core.arithmetic.weight_codec import INT8_ROWS

# Quotient, sum and product are rounded to 24 bits each: of codes up to 128 that is less than this share of a step.
ROUNDING = 1e-4
# Ranges narrower than EPS steps are constants by definition; wider than this, float32 itself overflows in a product.
MODERATE = st.floats(-1e6, 1e6, width=32)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Return the numbers that codes stand for."""
    return (codes - offset) * scale


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A small float32 matrix of moderate numbers, zeros and subnormals among them."""
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=6))
    return torch.from_numpy(draw(arrays("float32", shape, elements=MODERATE)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_activation_of_any_size_is_within_its_range_in_every_dtype(dtype):
    for high in torch.logspace(-5, 2, 400):
        x = torch.linspace(-float(high) / 3, float(high), 50).to(dtype)
        scale, offset = NUMERICS["float32"].input_scale(x.min(), x.max(), dtype)
        stands_for = dequantize(quantize(x.float(), scale.float(), offset.float()), scale.float(), offset.float())
        # One step: the offset is rounded, and so is the scale.
        assert (stands_for - x.float()).abs().max() <= 1.01 * scale.float(), float(high)


@given(tensors())
def test_symmetric_codes_are_within_half_a_step_of_every_number(x: Tensor):
    scale = symmetric_scale(x.abs().amax(dim=1, keepdim=True))
    codes = quantize(x, scale)
    assert bool((codes == codes.round()).all())
    assert bool((codes.abs() <= QMAX).all())
    assert bool(((dequantize(codes, scale) - x).abs() <= scale * (0.5 + ROUNDING)).all())


@given(tensors())
def test_asymmetric_codes_are_within_half_a_step_inside_the_range_and_a_step_at_its_ends(x: Tensor):
    low, high = x.aminmax()
    scale = asymmetric_scale(low, high)
    offset = asymmetric_offset(low, scale)
    assert QMIN <= offset.item() <= QMAX
    codes = quantize(x, scale, offset)
    assert bool(((codes >= QMIN) & (codes <= QMAX)).all())
    error = (dequantize(codes, scale, offset) - x).abs()
    clipped = (x / scale + offset > QMAX + 0.5) | (x / scale + offset < QMIN - 0.5)
    assert bool((error[~clipped] <= scale * (0.5 + ROUNDING)).all())
    # The offset is rounded to a whole step, so that 0 has a code: the far end may fall half a step beyond the codes.
    assert bool((error <= scale * (1 + ROUNDING)).all())


@given(tensors(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_stored_weight_is_within_half_a_stored_step_of_every_weight(w_OI: Tensor, dtype: torch.dtype):
    w_OI = (w_OI / 1e4).to(dtype)  # a fp16 scale of 1e6 / 127 would do, a weight of 1e6 would not
    found = INT8_ROWS.encode(w_OI, w_OI.abs().amax(1, keepdim=True), dtype, NUMERICS["float32"])
    scale_O1 = found.scale.float()
    # A scale rounded down puts the largest weight of a row behind code 127, by at most 127 * 2**-9 of a step in bf16:
    # a quarter. (In fp16 it may be a subnormal with few bits, and is rounded up where a quarter would not do.)
    error = (dequantize(found.codes.float(), scale_O1) - w_OI.float()).abs()
    assert bool((error <= scale_O1 * (0.5 + ROUNDING)).all())


@given(MODERATE, MODERATE)
def test_zero_has_a_code_of_its_own_in_every_range(a: float, b: float):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale = asymmetric_scale(low, high)
    offset = asymmetric_offset(low, scale)
    zero = torch.zeros(1)
    assert dequantize(quantize(zero, scale, offset), scale, offset).item() == 0
    wide_low, wide_high = include_zero(low, high)
    assert wide_low <= 0 <= wide_high


def test_the_worked_example_is_what_the_docstring_says():
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    scale = asymmetric_scale(low, high)
    offset = asymmetric_offset(low, scale)
    assert scale.item() == pytest.approx(0.015686, abs=1e-6)
    assert offset.item() == -64
    assert quantize(torch.tensor([0.0, 3.0, 9.0, -9.0]), scale, offset).tolist() == [-64, 127, 127, -128]
    assert symmetric_scale(torch.tensor(3.0)).item() == pytest.approx(0.0236, abs=1e-4)


def test_halves_are_rounded_to_even():
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.ones(1)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("amax", [0.0, 1e-12, 1e-38])
def test_a_range_of_nothing_has_a_scale_to_divide_by(amax: float):
    assert symmetric_scale(torch.tensor(amax)).item() == EPS
    assert asymmetric_scale(torch.tensor(0.0), torch.tensor(amax)).item() == EPS


@given(
    st.lists(st.floats(width=32, min_value=2.0**-149, max_value=2.0**127), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_packing_and_unpacking_a_deq_scale_keeps_every_bit(values: list[float], dtype: torch.dtype):
    deq_scale = torch.tensor(values, dtype=torch.float32)
    stored = pack_deq_scale(deq_scale, dtype)
    assert stored.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.int64)
    assert stored.shape == deq_scale.shape
    found = unpack_deq_scale(stored)
    assert torch.equal(found.view(torch.int32), deq_scale.view(torch.int32))


@given(st.integers(0, 2**32 - 1))
def test_every_pattern_of_32_bits_survives_also_with_the_sign_bit(bits: int):
    signed = bits - 2**32 if bits >= 2**31 else bits
    deq_scale = torch.tensor([[signed]], dtype=torch.int32).view(torch.float32)
    stored = pack_deq_scale(deq_scale, torch.float16)
    assert stored.item() == bits  # the high half is zero, never a sign
    assert unpack_deq_scale(stored).view(torch.int32).item() == signed


def test_one_half_packs_to_its_known_bits():
    assert pack_deq_scale(torch.tensor([0.5]), torch.float16).item() == 0x3F000000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_search_sees_small_rows_with_their_own_scales_and_rows_of_zeros_as_zeros(dtype: torch.dtype):
    # Scales from 1.2e-5 on: normal in the other dtypes, below float16's normal numbers.
    w_OI = (torch.randn(4, 256) * torch.tensor([[0.0], [5e-4], [2e-3], [1.0]])).to(dtype)
    found = INT8_ROWS.round_trip(w_OI)
    assert not found[0].any()
    scale_O1 = w_OI[1:].abs().amax(1, keepdim=True) / 127
    assert torch.equal(found[1:], (w_OI[1:] / scale_O1).round().clamp(-127, 127) * scale_O1)
