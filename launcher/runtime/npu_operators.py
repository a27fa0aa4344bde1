"""Stand in for torch_npu on the CPU: the operators that MindIE-SD's quantized layers call.

Each computes what its public documentation says, and raises on every rule that the documentation states: a stand-in
that casts in silence would prove little. Nothing here knows how the hardware rounds inside a kernel; what is left open
there is computed in float32 (spec: what the operators compute).

Legend: M tokens, K in features, N out features.

    npu_quantize                    x / scale + zero point                                     -> int8 codes
    npu_dynamic_quant               each token by its own maximum                              -> int8 codes, scales
    npu_quant_matmul                (A + int32 bias) * scale [* token scale], or A * scale * token scale + float bias,
                                    with A the exact sum of products of codes
    npu_weight_quant_batchmatmul    x @ ((weight + offset) * scale) + bias
    npu_format_cast                 the same values in another memory layout: here, its argument

A float16 output is scaled by 19 bits: the hardware keeps sign, exponent and the upper ten bits of the fraction of a
float32 `deq_scale`. Worked example: 0.01 is 0x3C23D70A; masked with 0xFFFFE000 it is 0x3C23C000, 0.0099945; the
output is 0.055 % smaller, one unit in the last place of a float16.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# What torch_npu reports for any argument that a kernel refuses.
_CODE = 161002
_QMIN, _QMAX = -128, 127
_LARGEST_AXIS = 65535
# Bits 31 to 13 of a float32, the ones that scale a float16 output; as a signed number of 32 bits.
_SCALE_BITS = 0xFFFFE000 - 2**32
# The only layout that a quantized weight is cast to (FRACTAL_NZ).
_FRACTAL_NZ = 29

Dtype = torch.dtype
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)


class OperatorError(RuntimeError):
    """A call that no kernel of the NPU takes."""

    def __init__(self, operator: str, rule: str) -> None:
        super().__init__(f"{operator}: {rule} (error code {_CODE})")


class _Kernel(NamedTuple):
    """Which dtypes go together in npu_quant_matmul; None stands for an argument that is left out."""

    output: Dtype
    scales: tuple[Dtype, ...]
    pertoken: tuple[Dtype | None, ...]
    biases: tuple[Dtype | None, ...]


_KERNELS = (
    _Kernel(
        torch.bfloat16,
        (torch.float32, torch.bfloat16),
        (None, torch.float32),
        (None, torch.int32, torch.bfloat16, torch.float32),
    ),
    # A float32 scale alone is converted by the operator to the int64 form.
    _Kernel(torch.float16, (torch.int64, torch.float32), (None,), (None, torch.int32)),
    _Kernel(
        torch.float16,
        (torch.float32,),
        (torch.float32,),
        (None, torch.int32, torch.float16, torch.float32),
    ),
)


def npu_quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor, dtype: Dtype, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """Return int8 codes, shaped like x: x / scales + zero_points, half to even, within -128 and 127.

    scales, zero_points: (1,) or one for each element along `axis`. Raises OperatorError.
    """
    check = partial(_check, "npu_quantize")
    check(x.dtype in _FLOATS, f"x is {x.dtype}, not float32, float16 or bfloat16")
    check(scales.dtype in (torch.float32, torch.bfloat16), f"scales are {scales.dtype}, not float32 or bfloat16")
    integers = (torch.int8, torch.uint8, torch.int32)
    check(
        zero_points.dtype in (*integers, torch.bfloat16),
        f"zero points are {zero_points.dtype}, not int8, uint8, int32 or bfloat16",
    )
    dtypes = {x.dtype, scales.dtype, zero_points.dtype}
    check(
        torch.bfloat16 not in (scales.dtype, zero_points.dtype) or len(dtypes) == 1,
        f"x, scales and zero points are {x.dtype}, {scales.dtype} and {zero_points.dtype}: bfloat16 is all or none",
    )
    check(dtype == torch.qint8 and div_mode, "only codes of torch.qint8 with div_mode are simulated")
    check(-x.ndim <= axis < x.ndim, f"axis {axis} is none of the {x.ndim} of x")
    check(scales.ndim == zero_points.ndim == 1, "scales and zero points are one-dimensional")
    check(
        len(scales) == len(zero_points) and len(scales) in (1, x.shape[axis]),
        f"{len(scales)} scales and {len(zero_points)} zero points for {x.shape[axis]} elements along the axis",
    )
    along = [1] * x.ndim
    along[axis] = -1
    points = x.to(torch.float32) / scales.to(torch.float32).reshape(along)
    return _codes(points + zero_points.to(torch.float32).reshape(along))


def npu_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes like x (..., K) and the float32 scale (...) of each token: its largest magnitude over 127.

    A token of zeros has zero codes; the documentation leaves its scale open. Raises OperatorError.
    """
    _check("npu_dynamic_quant", x.dtype in _HALVES, f"x is {x.dtype}, not float16 or bfloat16")
    _check("npu_dynamic_quant", x.ndim >= 2, f"x has {x.ndim} dimensions, not two or more")
    exact = x.to(torch.float32)
    scale = exact.abs().amax(dim=-1, keepdim=True) / _QMAX
    codes = _codes(torch.where(scale > 0, exact / scale, torch.zeros_like(exact)))
    return codes, scale.squeeze(-1)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Dtype | None = None,
) -> Tensor:
    """Return the product of codes (M, N) in `output_dtype`; x1: (M, K) int8, x2: (K, N) int8.

    scale: (1,) or (N,); pertoken_scale: (M,); bias: (N,). Raises OperatorError.
    """
    _check_product("npu_quant_matmul", x1, x2)
    _check("npu_quant_matmul", x1.dtype == torch.int8, f"x1 is {x1.dtype}, not int8")
    _check_quant_matmul(len(x1), x2.shape[1], scale, offset, pertoken_scale, bias, output_dtype)
    assert output_dtype is not None, "checked"
    # In float64, where no sum of 65535 products of codes rounds.
    total = (x1.to(torch.float64) @ x2.to(torch.float64)).to(torch.int64)
    is_integer = bias is not None and bias.dtype == torch.int32
    if bias is not None and is_integer:
        total = total + bias
    keeps_19_bits = output_dtype == torch.float16 and pertoken_scale is None
    y = total.to(torch.float32) * (_of_19_bits(scale) if keeps_19_bits else scale.to(torch.float32))
    if pertoken_scale is not None:
        y = y * pertoken_scale[:, None]
    if bias is not None and not is_integer:
        y = y + bias.to(torch.float32)
    return y.to(output_dtype)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
) -> Tensor:
    """Return x @ ((weight + offset) * scale) + bias, (M, N) in x's dtype; x: (M, K), weight: (K, N) int8.

    antiquant_scale, antiquant_offset: (N,) or (1, N) in x's dtype; bias: (N,), float32 for bfloat16 and float16 for
    float16. The weight that codes stand for is rounded to x's dtype, the sum is not. Raises OperatorError.
    """
    check = partial(_check, "npu_weight_quant_batchmatmul")
    _check_product("npu_weight_quant_batchmatmul", x, weight)
    check(x.dtype in _HALVES, f"x is {x.dtype}, not float16 or bfloat16")
    check(quant_scale is None and quant_offset is None, "a quantized output is not simulated")
    check(antiquant_group_size == 0, "scales by groups are not simulated")
    columns = weight.shape[1]
    for name, tensor in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        if tensor is not None:
            shape, allowed = tuple(tensor.shape), ((columns,), (1, columns))
            check(tensor.dtype == x.dtype, f"{name} is {tensor.dtype}, x is {x.dtype}")
            check(shape in allowed, f"{name} is {shape}, not ({columns},) or (1, {columns})")
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        check(bias.dtype == wanted, f"bias is {bias.dtype}, x is {x.dtype}: it has to be {wanted}")
        check(tuple(bias.shape) == (columns,), f"bias is {tuple(bias.shape)}, not ({columns},)")
    points = weight.to(x.dtype) if antiquant_offset is None else weight.to(x.dtype) + antiquant_offset
    y = x.to(torch.float32) @ (points * antiquant_scale).to(torch.float32)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def npu_format_cast(tensor: Tensor, acl_format: int) -> Tensor:
    """Return the tensor: a memory layout has no meaning here. Raises OperatorError."""
    _check("npu_format_cast", acl_format == _FRACTAL_NZ, f"format {acl_format} is not simulated")
    return tensor


OPERATORS = (npu_quantize, npu_dynamic_quant, npu_quant_matmul, npu_weight_quant_batchmatmul, npu_format_cast)


def install() -> ModuleType:
    """Make `import torch_npu` find the stand-in in this process, and return it.

    It changes torch (`torch.npu`, `Tensor.npu`), so it belongs into a process of its own. Where a real torch_npu is
    installed, that process imports neither it nor diffusers, which looks for its metadata.
    """
    module = ModuleType("torch_npu", __doc__)
    module.__spec__ = ModuleSpec("torch_npu", loader=None)  # without one, importlib.util.find_spec raises
    for operator in OPERATORS:
        setattr(module, operator.__name__, operator)
    npu = ModuleType("torch.npu")
    npu.is_available = lambda: False  # type: ignore[attr-defined]
    npu.device_count = lambda: 0  # type: ignore[attr-defined]
    npu.empty_cache = lambda: None  # type: ignore[attr-defined]
    torch.npu = npu  # type: ignore[attr-defined]
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = module
    return module


def _check(operator: str, holds: bool, rule: str) -> None:
    if not holds:
        raise OperatorError(operator, rule)


def _check_product(operator: str, x: Tensor, weight: Tensor) -> None:
    """Check the rules that both matrix products share."""
    _check(operator, x.ndim == weight.ndim == 2, "only products of two matrices are simulated")
    _check(operator, weight.dtype == torch.int8, f"the weight is {weight.dtype}, not int8")
    _check(operator, x.shape[1] == weight.shape[0], f"{tuple(x.shape)} @ {tuple(weight.shape)} is no product")
    _check(operator, max(weight.shape) <= _LARGEST_AXIS, f"K and N are {tuple(weight.shape)}, beyond {_LARGEST_AXIS}")


def _check_quant_matmul(
    rows: int,
    columns: int,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: Dtype | None,
) -> None:
    check = partial(_check, "npu_quant_matmul")
    check(offset is None, "an offset belongs to an int8 output, which is not simulated")
    check(scale.ndim == 1 and len(scale) in (1, columns), f"scale is {tuple(scale.shape)}, not (1,) or ({columns},)")
    if pertoken_scale is not None:
        check(tuple(pertoken_scale.shape) == (rows,), f"pertoken_scale is {tuple(pertoken_scale.shape)}, not ({rows},)")
    if bias is not None:
        check(tuple(bias.shape) == (columns,), f"bias is {tuple(bias.shape)}, not ({columns},)")
    pertoken_dtype = None if pertoken_scale is None else pertoken_scale.dtype
    bias_dtype = None if bias is None else bias.dtype
    known = any(
        output_dtype == kernel.output
        and scale.dtype in kernel.scales
        and pertoken_dtype in kernel.pertoken
        and bias_dtype in kernel.biases
        for kernel in _KERNELS
    )
    check(
        known,
        f"no kernel for output {output_dtype}, scale {scale.dtype}, pertoken_scale {pertoken_dtype}, bias {bias_dtype}",
    )


def _codes(points: Tensor) -> Tensor:
    return points.round().clamp(_QMIN, _QMAX).to(torch.int8)


def _of_19_bits(scale: Tensor) -> Tensor:
    """Return what the hardware makes of a scale for a float16 output: float32, without its last 13 bits."""
    bits = scale.contiguous().view(torch.int32) if scale.dtype == torch.float32 else scale.to(torch.int32)
    return (bits & _SCALE_BITS).view(torch.float32)
