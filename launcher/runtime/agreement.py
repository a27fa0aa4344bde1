"""Compare one layer's output as the runtime computes it with the one that the product says it will compute.

Both multiply the same integers exactly, so what may differ is small and known. It adds up to a bound for each output:

    rounding     both round a float32 to the output's dtype, and neighbours in float32 may round to neighbours there:
                 one unit in the last place, at most eps * |y|
    float32      the two multiply and add in another order: a few units of 2**-24 of what is added
    19 bits      a float16 output of a static layer is scaled by a `deq_scale` without its last 13 bits, which takes
                 up to 2**-10 of it; `DeployedLinear` scales by all of them
    codes        an input that falls within a few float32 roundings of the middle between two codes may get either:
                 then the output moves by that column of the weight, times the scale of a code

The last allowance is made for the inputs that do fall there, and is zero for a token without any; where both sides
divide in IEEE float32, as on a CPU, nobody needs it (`moved`). A scale that is wrong by 3 % moves most outputs of its
row by four to eight units in the last place of a bfloat16: beyond the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant_core.checkpoint.reader import Checkpoint
from quant_core.layers.deployed import DeployedLayer
from quant_core.schemes.scheme import Inputs

# Where the classes are that the runtime puts in the place of linear layers.
_HOME = "mindiesd.quantization.layer"
# How many codes the standard deviation of an input spans: some inputs lie beyond the calibrated range.
_CODES = 60
# What the runtime rounds to the dtype of the run.
_ROUNDED = ("weight_scale", "mul_scale", "bias")
_FLOAT32_ERRORS = 2.0**-22
_LOST_WITH_13_BITS = 2.0**-10


class Agreement(NamedTuple):
    """How far two outputs of a layer are apart.

    excess: the largest difference in units of its bound. unequal: how many of the outputs differ at all. moved: how
    many differ by more than they could if every input had the same code.
    """

    excess: float
    outputs: int
    unequal: int
    moved: int


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that the runtime put in the place of linear layers, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__module__ == _HOME}


@torch.no_grad()
def agreements(
    runtime: Any, checkpoint: Checkpoint, name: str, module: nn.Module, dtype: torch.dtype
) -> Iterator[Agreement]:
    """Yield the agreement of a replaced layer with the quantizer's arithmetic, of each step if it has steps.

    runtime: `mindiesd.quantization`; checkpoint: says what the layer of that name computes; dtype: of the run.
    """
    stored = checkpoint.read_layer(name)
    tensors = {key: t.to(dtype) if key in _ROUNDED else t for key, t in stored.tensors.items()}
    layer, generator = DeployedLayer(stored.arithmetic, tensors), torch.Generator().manual_seed(len(name))
    scheme = stored.arithmetic.scheme
    for step in range(checkpoint.inventory.timesteps or 0) if scheme.per_step else [None]:
        if step is not None:
            runtime.TimestepManager.set_timestep_idx(step)
        x = _example_input(tensors, step, generator).to(dtype)
        if scheme.inputs is Inputs.FLOAT:
            x_NI = x.reshape(-1, x.shape[-1])
            yield compare_weight_only(module(x_NI), x_NI, tensors)
        else:
            static = "input_scale" in tensors and (step is None or step >= (checkpoint.timestep_sep or 0))
            yield compare(module(x), layer(x, step), x, tensors, step, static=static)


def _example_input(tensors: Mapping[str, Tensor], step: int | None, generator: torch.Generator) -> Tensor:
    """Return (2, 3, I), normal, beyond the calibrated range at its ends; the first token is all zeros."""
    x = torch.randn(2, 3, tensors["weight"].shape[1], generator=generator)
    if "input_scale" in tensors:
        scale = tensors["input_scale"] if step is None else tensors["input_scale"][step]
        x *= _CODES * scale.to(torch.float32)
    if "mul_scale" in tensors:
        x /= tensors["mul_scale"].to(torch.float32)
    x[0, 0] = 0
    return x


def compare(
    found: Tensor, expected: Tensor, x: Tensor, tensors: Mapping[str, Tensor], row: int | None, *, static: bool
) -> Agreement:
    """Compare two outputs (..., O) of a quantized layer for the input x (..., I).

    tensors: the layer's, by the last component of their names. row: of a static step, None for tensors without rows.
    Raises AssertionError when shapes or dtypes differ.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), (found.shape, found.dtype, expected.dtype)
    x_NI = x * tensors["mul_scale"] if "mul_scale" in tensors else x
    codes_NO = _codes_bound(x_NI.reshape(-1, x.shape[-1]).to(torch.float64), tensors, row, static)
    found_NO, y_NO = (y.reshape(-1, y.shape[-1]).to(torch.float64) for y in (found, expected))
    limits, bias_O = torch.finfo(expected.dtype), tensors.get("bias")
    added_NO = y_NO.abs() if bias_O is None else y_NO.abs() + 2 * bias_O.to(torch.float64).abs()
    bound_NO = limits.eps * (y_NO.abs() + limits.smallest_normal) + _FLOAT32_ERRORS * added_NO
    if static and expected.dtype == torch.float16:
        bound_NO = bound_NO + _LOST_WITH_13_BITS * y_NO.abs()
    apart_NO = (found_NO - y_NO).abs()
    counts = (apart_NO > 0).sum(), (apart_NO > bound_NO).sum()
    return Agreement(float((apart_NO / (bound_NO + codes_NO)).max()), y_NO.numel(), *map(int, counts))


def _codes_bound(x_NI: Tensor, tensors: Mapping[str, Tensor], row: int | None, static: bool) -> Tensor:
    """Return how far outputs (N, O) move when every input that is close to the middle of two codes gets the other."""
    if static:
        scale, offset = (
            (tensors[name] if row is None else tensors[name][row]).to(torch.float64)
            for name in ("input_scale", "input_offset")
        )
    else:
        scale, offset = x_NI.abs().amax(dim=1, keepdim=True) / 127, torch.zeros(1, dtype=torch.float64)
    near_NI = _is_near_the_middle(torch.where(scale > 0, x_NI / scale, 0), offset).to(torch.float64)
    step_NO = scale * tensors["weight_scale"].to(torch.float64).squeeze(-1)
    return near_NI @ tensors["weight"].to(torch.float64).abs().T * step_NO


def _is_near_the_middle(points_NI: Tensor, offset: Tensor) -> Tensor:
    """Tell which points fall so close to the middle between two codes that float32 may round them to either."""
    distance = ((points_NI + offset).remainder(1) - 0.5).abs()
    return distance <= _FLOAT32_ERRORS * (points_NI.abs() + offset.abs())


def compare_weight_only(found: Tensor, x_NI: Tensor, tensors: Mapping[str, Tensor]) -> Agreement:
    """Compare the output (N, O) of a W8A16 layer with x @ (weight * scale).T + bias; the weight is in x's dtype.

    The sum of a row is not exact here: each of its terms may be off by a float32 rounding for each one before it.
    """
    w_OI = (tensors["weight"].to(x_NI.dtype) * tensors["weight_scale"]).to(torch.float64)
    bias_O = tensors.get("bias", torch.zeros(len(w_OI))).to(torch.float64)
    y_NO, terms_NO = x_NI.to(torch.float64) @ w_OI.T + bias_O, x_NI.to(torch.float64).abs() @ w_OI.abs().T
    assert (found.dtype, found.shape) == (x_NI.dtype, y_NO.shape), (found.dtype, found.shape)
    limits = torch.finfo(found.dtype)
    bound_NO = limits.eps * (y_NO.abs() + limits.smallest_normal) + 2.0**-24 * w_OI.shape[1] * terms_NO
    difference_NO = (found.to(torch.float64) - y_NO).abs()
    unequal = int((found != y_NO.to(found.dtype)).sum())
    return Agreement(float((difference_NO / bound_NO).max()), y_NO.numel(), unequal, 0)
