"""Compute what the hardware computes: integer products of stored codes, instead of fake-quantized floats.

Legend: N tokens, I in features, O out features, T timesteps. For a layer without smoothing (a smoothed one multiplies
its input with `mul_scale` first), with codes `w_OI` (spec: scales, how the consumer computes):

    static    q_NI = clamp(round(x / input_scale + input_offset), -128, 127)
              y    = (q_NI @ w_OI.T + quant_bias) * deq_scale                 the bracket is int32
    dynamic   s_N  = max over I of |x_NI| / 127,    q_NI = round(x / s_N)
              y    = (q_NI @ w_OI.T) * s_N * weight_scale + bias
    timestep  dynamic in steps below `timestep_sep`, then static with row t of the static tensors in step t

Worked example, static: x = [1.0, 0.5], w = [[0.3, -0.6]], bias 0.1; input range [-1, 3]: scale 0.015686, offset -64;
weight scale 0.6 / 127 = 0.0047244, codes [64 (63.5 to even), -127]; deq_scale = 0.015686 * 0.0047244 = 7.4109e-5;
quant_bias = round(0.1 / 7.4109e-5 + 64 * (64 - 127)) = 1349 - 4032 = -2683. q = [0, -32]; the product is 4064;
y = (4064 - 2683) * 7.4109e-5 = 0.10234, and the float layer says 0.1.

A layer changes its class, never its place, so hooks (the collectives of tensor parallelism) stay: a row-split layer
dequantizes its own partial sum, and the hook adds the parts up. Its codes take the place of the float weight, a half
to a quarter of the memory. The tensors keep their stored form, so casting a deployed model to a narrower dtype would
change its scales: move it between devices, or widen it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_core.arithmetic.integer_product import integer_product
from quant_core.arithmetic.scales import QMAX, quantize, unpack_deq_scale
from quant_core.calibration.timestep import TimestepManager
from quant_core.errors import ConfigurationError
from quant_core.layers.calibrated import CalibratedLinear

# The tensors of one layer under the last component of their names in a checkpoint; an absent one is None or missing.
Tensors = Mapping[str, Tensor | None]

# A token of zeros has the codes 0 whatever its scale is, as long as that is a number to divide by.
_SMALLEST = torch.finfo(torch.float32).tiny
# Not computed with: symmetric weights have no offset, and the consumer reads none.
_UNUSED = frozenset({"weight", "bias", "weight_offset"})


@dataclass(frozen=True)
class DeployedArithmetic:
    """Say how one layer computes: by the type of its scheme.

    name: for errors. timestep_sep: the first static step of W8A8_TIMESTEP; half the steps when None.
    """

    name: str
    quant_type: str
    timestep_sep: int | None = None

    def output(self, x: Tensor, tensors: Tensors, step: int | None) -> Tensor:
        """Return the layer's output (..., O) in x's dtype; x: (..., I), step: index of the denoising step, if any.

        Raises ConfigurationError when the scheme needs the step and it is unknown or has no row.
        """
        mul_scale_I = tensors.get("mul_scale")
        return _OUTPUTS[self.quant_type](self, x if mul_scale_I is None else x * mul_scale_I, tensors, step)


@dataclass(frozen=True)
class DeployedLayer:
    """Bind the arithmetic of a layer to its tensors, on one device: call it with an input."""

    arithmetic: DeployedArithmetic
    tensors: Mapping[str, Tensor]

    def __call__(self, x: Tensor, step: int | None = None) -> Tensor:
        """Return the layer's output (..., O); see `DeployedArithmetic.output`."""
        return self.arithmetic.output(x, self.tensors, step)


class DeployedLinear(nn.Linear):
    """A linear layer that computes in integers: `weight` holds int8 codes, the other tensors are buffers."""

    arithmetic: DeployedArithmetic

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the step that `TimestepManager` says; input: (..., in_features)."""
        # Read anew in each call, because offloading moves them.
        tensors = {**self._parameters, **self._buffers}
        return self.arithmetic.output(input, tensors, TimestepManager.get_timestep_idx())


def deploy(model: nn.Module, quant_type: str, *, timestep_sep: int | None = None) -> None:
    """Turn every calibrated linear of the model into a deployed one, in place, on the device where it is."""
    for module in model.modules():
        if isinstance(module, CalibratedLinear):
            layer = module.layer
            del module.layer
            smoothing = {} if layer.mul_scale_I is None else {"mul_scale": layer.mul_scale_I}
            arithmetic = DeployedArithmetic(layer.name, quant_type, timestep_sep)
            deploy_linear(module, DeployedLayer(arithmetic, {**layer.tensors, **smoothing}))


def deploy_linear(linear: nn.Linear, layer: DeployedLayer) -> None:
    """Make a linear compute as `layer` does: exchange its class and its tensors; shapes must fit already."""
    tensors = layer.tensors
    device = tensors["weight"].device if linear.weight.is_meta else linear.weight.device
    linear.weight = nn.Parameter(tensors["weight"].to(device), requires_grad=False)
    bias_O = tensors.get("bias")
    bias = None if bias_O is None else nn.Parameter(bias_O.to(device), requires_grad=False)
    linear.register_parameter("bias", bias)
    for name, tensor in tensors.items():
        if name not in _UNUSED:
            linear.register_buffer(name, tensor.to(device))
    linear.__class__ = DeployedLinear
    linear.arithmetic = layer.arithmetic  # type: ignore[assignment]


def static_output(x: Tensor, tensors: Tensors, row: int | None = None) -> Tensor:
    """Return the output (..., O) of a static layer in x's dtype; row: which of the T rows, None when there is one."""
    found = [_needed(tensors, name) for name in ("input_scale", "input_offset", "quant_bias", "deq_scale")]
    scale, offset, quant_bias_O, deq_scale_O = found if row is None else [tensor[row] for tensor in found]
    codes = quantize(x.to(torch.float32), scale.to(torch.float32), offset.to(torch.float32))
    points = _product(codes, tensors) + quant_bias_O
    return (points * unpack_deq_scale(deq_scale_O)).to(x.dtype)


def dynamic_output(x: Tensor, tensors: Tensors) -> Tensor:
    """Return the output (..., O) of a dynamic layer in x's dtype: each token symmetric in its own range."""
    exact = x.to(torch.float32)
    scale_N1 = (exact.abs().amax(dim=-1, keepdim=True) / QMAX).clamp(min=_SMALLEST)
    codes = quantize(exact, scale_N1, qmin=-QMAX)
    weight_scale_O = _needed(tensors, "weight_scale").to(torch.float32).squeeze(-1)
    y = _product(codes, tensors) * scale_N1 * weight_scale_O
    bias_O = tensors.get("bias")
    return (y if bias_O is None else y + bias_O).to(x.dtype)


def _product(codes: Tensor, tensors: Tensors) -> Tensor:
    """Return the integer product (..., O) int32 of whole numbers (..., I) in a float dtype with the weight's codes."""
    w_OI = _needed(tensors, "weight")
    x_NI = codes.to(torch.int8).reshape(-1, w_OI.shape[1])
    return integer_product(x_NI, w_OI).reshape(*codes.shape[:-1], w_OI.shape[0])


def _needed(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[name]
    assert tensor is not None, f"a deployed layer has its {name}"
    return tensor


def _in_step(arithmetic: DeployedArithmetic, x: Tensor, tensors: Tensors, step: int | None) -> Tensor:
    rows = len(_needed(tensors, "input_scale"))
    if step is None or not 0 <= step < rows:
        raise _no_row(arithmetic.name, step, rows)
    first_static = separator(arithmetic.timestep_sep, rows)
    return dynamic_output(x, tensors) if step < first_static else static_output(x, tensors, step)


def separator(timestep_sep: int | None, timesteps: int) -> int:
    """Return the first static step of a timestep scheme: as asked, or half the steps."""
    return timesteps // 2 if timestep_sep is None else timestep_sep


def _no_row(name: str, step: int | None, rows: int) -> ConfigurationError:
    return ConfigurationError(
        "the denoising step is unknown" if step is None else f"denoising step {step} has no scales",
        where=f"layer {name}, W8A8_TIMESTEP with {rows} steps",
        why=f"each step has a row of scales of its own, 0 to {rows - 1}",
        advice="call TimestepManager.set_timestep_idx(i) in each step, and run no more steps than were calibrated",
    )


_Output = Callable[[DeployedArithmetic, Tensor, Tensors, "int | None"], Tensor]

_OUTPUTS: Mapping[str, _Output] = {
    "W8A8": lambda arithmetic, x, tensors, step: static_output(x, tensors),
    "W8A8_DYNAMIC": lambda arithmetic, x, tensors, step: dynamic_output(x, tensors),
    "W8A8_TIMESTEP": _in_step,
}
