"""The stand-in for the NPU's operators computes what is documented, and refuses every call that no kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from launcher.runtime.npu_operators import (
    OperatorError,
    npu_dynamic_quant,
    npu_format_cast,
    npu_quant_matmul,
    npu_quantize,
    npu_weight_quant_batchmatmul,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, INT32, INT64 = torch.int8, torch.int32, torch.int64
TOKENS, INPUTS, OUTPUTS = 2, 3, 4
# 0.01 is 0x3C23D70A; without its last 13 bits it is this.
HUNDREDTH, HUNDREDTH_OF_19_BITS = 0x3C23D70A, 0.0099945068359375


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=INT8)


def static_codes(x: list[float], scale: float, offset: int, dtype: torch.dtype = BF16) -> list[int]:
    found = npu_quantize(
        torch.tensor([x], dtype=dtype),
        torch.tensor([scale], dtype=BF16 if dtype == BF16 else FP32),
        torch.tensor([offset], dtype=BF16 if dtype == BF16 else INT8),
        torch.qint8,
        axis=-1,
    )
    assert found.dtype == INT8
    return found[0].tolist()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_static_codes_round_half_to_even_and_stay_in_eight_bits(dtype: torch.dtype) -> None:
    assert static_codes([0.25, 0.75, 1.25, -0.25, 0.0], 0.5, 0, dtype) == [0, 2, 2, 0, 0]
    assert static_codes([0.25, 100, -100], 0.5, 10, dtype) == [10, 127, -128]  # 10.5 to even


def test_a_scale_for_each_feature_applies_along_the_axis() -> None:
    x, scales = torch.ones(2, 3, dtype=BF16), torch.tensor([1, 0.5, 0.25], dtype=BF16)
    assert npu_quantize(x, scales, scales * 0, torch.qint8, axis=-1).tolist() == [[1, 2, 4]] * 2


def test_each_token_is_quantized_by_its_own_maximum() -> None:
    x = torch.tensor([[[1, -2, 0.5]], [[0, 0, 0]]], dtype=BF16)
    found, scales = npu_dynamic_quant(x)
    assert found.tolist() == [[[64, -127, 32]], [[0, 0, 0]]]  # 63.5 to even, 31.75
    assert (found.dtype, scales.dtype, scales.shape) == (INT8, FP32, (2, 1))
    assert scales[0].item() == pytest.approx(2 / 127)


def test_an_int32_bias_is_added_before_the_scale() -> None:
    scale, bias = torch.tensor([0.5, 0.25, 2, 1]), torch.tensor([1, -1, 3, 0], dtype=INT32)
    x, w = codes(TOKENS, INPUTS), codes(INPUTS, OUTPUTS)
    exact = (x.long() @ w.long() + bias) * scale
    assert torch.equal(npu_quant_matmul(x, w, scale, bias=bias, output_dtype=BF16), exact.to(BF16))


def test_a_float_bias_is_added_after_both_scales() -> None:
    scale, tokens = torch.tensor([0.5, 0.25, 2, 1]), torch.tensor([2.0, 0.5])
    bias = torch.tensor([1.5, -1, 3, 0], dtype=BF16)
    x, w = codes(TOKENS, INPUTS), codes(INPUTS, OUTPUTS)
    exact = (x.long() @ w.long()) * scale * tokens[:, None] + bias.float()
    found = npu_quant_matmul(x, w, scale, pertoken_scale=tokens, bias=bias, output_dtype=BF16)
    assert torch.equal(found, exact.to(BF16))


def test_the_longest_sum_of_the_largest_codes_is_exact() -> None:
    x, w = torch.full((1, 65535), -128, dtype=INT8), torch.full((65535, 1), -127, dtype=INT8)
    w[0, 0] = -126
    bias = torch.tensor([-65535 * 16256 + 129], dtype=INT32)  # one product is 128 less
    assert npu_quant_matmul(x, w, torch.ones(1), bias=bias, output_dtype=BF16).item() == 1


@pytest.mark.parametrize("scale", [torch.tensor([HUNDREDTH]), torch.tensor([0.01])], ids=["int64", "float32"])
def test_a_float16_output_is_scaled_by_19_bits(scale: Tensor) -> None:
    """In the stored form and in the one that the operator converts; with a scale for each token, by all bits."""
    x, w = torch.ones(1, 1, dtype=INT8), torch.ones(1, 1, dtype=INT8)
    million = torch.tensor([10**6 - 1], dtype=INT32)
    found = npu_quant_matmul(x, w, scale, bias=million, output_dtype=FP16)
    assert found.item() == torch.tensor(10**6 * HUNDREDTH_OF_19_BITS).half().item() != 10**4
    if scale.dtype == FP32:
        tokens = torch.tensor([1e6])
        assert npu_quant_matmul(x, w, scale, pertoken_scale=tokens, output_dtype=FP16).item() == 10**4


def test_a_bfloat16_output_is_scaled_by_all_bits() -> None:
    x, w = torch.ones(1, 1, dtype=INT8), torch.ones(1, 1, dtype=INT8)
    # 25540 * 0.01 = 255.4 rounds to 255, 25550 * 0.01 = 255.5 up to 256, but 25550 * 0.0099945 = 255.36 would not.
    bias = torch.tensor([25549], dtype=INT32)
    assert npu_quant_matmul(x, w, torch.tensor([0.01]), bias=bias, output_dtype=BF16).item() == 256


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_alone_are_dequantized_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, w = torch.tensor([[1, 2, -0.5]], dtype=dtype), codes(INPUTS, OUTPUTS)
    scale, bias = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=dtype), torch.tensor([1, 2, 3, 4.5])
    found = npu_weight_quant_batchmatmul(x, w, scale, bias=bias if dtype == BF16 else bias.half())
    exact = x.double() @ (w.to(dtype) * scale).double() + bias
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def test_a_memory_layout_changes_no_value() -> None:
    w = codes(INPUTS, OUTPUTS)
    assert npu_format_cast(w, 29) is w


def ones(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
    return None if dtype is None else torch.ones(shape, dtype=dtype)


def quantize_with(*dtypes: torch.dtype, **changes: object) -> Tensor:
    """Call npu_quantize as MindIE-SD does; dtypes: of the input (2, 3), the scales and the zero points (3,)."""
    x, scales, points = dtypes or (BF16, BF16, BF16)
    valid = {"x": ones(x, TOKENS, INPUTS), "scales": ones(scales, INPUTS), "zero_points": ones(points, INPUTS)}
    return npu_quantize(**{**valid, "dtype": torch.qint8, "axis": -1, **changes})  # type: ignore[arg-type]


def product_with(**changes: object) -> Tensor:
    """Call npu_quant_matmul on a (2, 3) and a (3, 4) matrix, with nothing but a float32 scale and a bfloat16 output."""
    valid = {"x1": codes(TOKENS, INPUTS), "x2": codes(INPUTS, OUTPUTS), "scale": ones(FP32, OUTPUTS)}
    return npu_quant_matmul(**{**valid, "output_dtype": BF16, **changes})  # type: ignore[arg-type]


def weights_with(*dtypes: torch.dtype, **changes: object) -> Tensor:
    """Call npu_weight_quant_batchmatmul as MindIE-SD does; dtypes: of the input, scales (1, 4) and bias (4,)."""
    x, scale, bias = dtypes or (BF16, BF16, FP32)
    valid = {"x": ones(x, TOKENS, INPUTS), "weight": codes(INPUTS, OUTPUTS), "bias": ones(bias, OUTPUTS)}
    arguments = {**valid, "antiquant_scale": ones(scale, 1, OUTPUTS), **changes}
    return npu_weight_quant_batchmatmul(**arguments)  # type: ignore[arg-type]


def test_the_calls_that_are_changed_below_are_valid() -> None:
    assert quantize_with().dtype == quantize_with(FP16, FP32, INT8).dtype == torch.int8
    assert product_with().dtype == weights_with().dtype == BF16
    assert weights_with(FP16, FP16, FP16).dtype == FP16


KERNELS = {
    (output, scale, token, bias)
    for output, scales, tokens, biases in [
        (BF16, (FP32, BF16), (None, FP32), (None, INT32, BF16, FP32)),
        (FP16, (INT64, FP32), (None,), (None, INT32)),
        (FP16, (FP32,), (FP32,), (None, INT32, FP16, FP32)),
    ]
    for scale in scales
    for token in tokens
    for bias in biases
}


def has_kernel(output: object, scale: torch.dtype, token: torch.dtype | None, bias: torch.dtype | None) -> bool:
    given = {"scale": ones(scale, OUTPUTS), "pertoken_scale": ones(token, TOKENS), "bias": ones(bias, OUTPUTS)}
    try:
        product_with(output_dtype=output, **given)
    except OperatorError:
        return False
    return True


def test_exactly_the_documented_combinations_of_dtypes_have_a_kernel() -> None:
    outputs, scales = (BF16, FP16, FP32, INT8, None), (BF16, FP16, FP32, INT64, INT32)
    tokens, biases = (None, FP32, BF16, FP16), (None, INT32, BF16, FP16, FP32, INT64)
    found = {row for row in product(outputs, scales, tokens, biases) if has_kernel(*row)}
    assert found == KERNELS


LONG = 65536
REFUSED: dict[str, Callable[[], object]] = {
    "x of npu_quantize is an integer": lambda: quantize_with(INT8, FP32, INT8),
    "float16 scales": lambda: quantize_with(FP16, FP16, INT8),
    "int64 zero points": lambda: quantize_with(FP16, FP32, INT64),
    "bfloat16 scales, int8 zero points": lambda: quantize_with(BF16, BF16, INT8),
    "float16 x, bfloat16 scales": lambda: quantize_with(FP16, BF16, BF16),
    "float32 scales, bfloat16 zero points": lambda: quantize_with(BF16, FP32, BF16),
    "scales for another number of features": lambda: quantize_with(scales=ones(BF16, 2), zero_points=ones(BF16, 2)),
    "scales for the other axis": lambda: quantize_with(axis=0),
    "codes of another type": lambda: quantize_with(dtype=torch.quint8),
    "no such axis": lambda: quantize_with(axis=2),
    "a row of scales": lambda: quantize_with(scales=ones(BF16, 1, 3), zero_points=ones(BF16, 1, 3)),
    "more zero points than scales": lambda: quantize_with(scales=ones(BF16, 1)),
    "a float32 token": lambda: npu_dynamic_quant(torch.ones(2, 3)),
    "a token alone": lambda: npu_dynamic_quant(torch.ones(3, dtype=BF16)),
    "float codes": lambda: product_with(x1=ones(BF16, TOKENS, INPUTS)),
    "a float weight": lambda: product_with(x2=ones(BF16, INPUTS, OUTPUTS)),
    "three dimensions": lambda: product_with(x1=codes(1, TOKENS, INPUTS)),
    "shapes that are no product": lambda: product_with(x2=codes(OUTPUTS, INPUTS)),
    "a scale for another number of outputs": lambda: product_with(scale=ones(FP32, 3)),
    "a column of scales": lambda: product_with(scale=ones(FP32, OUTPUTS, 1)),
    "a scale without a dimension": lambda: product_with(scale=torch.tensor(1.0)),
    "scales for another number of tokens": lambda: product_with(pertoken_scale=ones(FP32, 3)),
    "a column of token scales": lambda: product_with(pertoken_scale=ones(FP32, TOKENS, 1)),
    "a bias for another number of outputs": lambda: product_with(bias=ones(INT32, 3)),
    "an offset": lambda: product_with(offset=ones(FP32, OUTPUTS)),
    "K beyond 65535": lambda: product_with(x1=codes(TOKENS, LONG), x2=codes(LONG, OUTPUTS)),
    "N beyond 65535": lambda: product_with(x2=codes(INPUTS, LONG), scale=ones(FP32, 1)),
    "a float32 input": lambda: weights_with(FP32, FP32, FP32),
    "a weight scale of another dtype": lambda: weights_with(BF16, FP32, FP32),
    "a bfloat16 bias": lambda: weights_with(BF16, BF16, BF16),
    "a float32 bias in float16": lambda: weights_with(FP16, FP16, FP32),
    "a column of weight scales": lambda: weights_with(antiquant_scale=ones(BF16, OUTPUTS, 1)),
    "a weight offset of another dtype": lambda: weights_with(antiquant_offset=ones(INT8, 1, OUTPUTS)),
    "a bias of another size": lambda: weights_with(bias=ones(FP32, 3)),
    "weight scales by groups": lambda: weights_with(antiquant_group_size=32),
    "a quantized output": lambda: weights_with(quant_scale=ones(FP32, OUTPUTS)),
    "K beyond 65535, weights alone": lambda: weights_with(x=ones(BF16, TOKENS, LONG), weight=codes(LONG, OUTPUTS)),
    "another memory layout": lambda: npu_format_cast(codes(1, 1), 2),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_no_kernel_takes(call: Callable[[], object]) -> None:
    with pytest.raises(OperatorError, match="161002"):
        call()
