"""What the runtime's operators make of an input and a layer's stored tensors (spec: how the consumer computes).

Legend: N tokens, I in features, O out features, T timesteps. For an input that smoothing has multiplied already, with
codes `w_OI`:

    static    q_NI = clamp(round(x / input_scale + input_offset), -128, 127)
              y    = (q_NI @ w_OI.T + quant_bias) * deq_scale                 the bracket is int32
    dynamic   s_N  = max over I of |x_NI| / 127,    q_NI = round(x / s_N)
              y    = (q_NI @ w_OI.T) * s_N * weight_scale + bias

Worked example, static: x = [1.0, 0.5], w = [[0.3, -0.6]], bias 0.1; input range [-1, 3]: scale 0.015686, offset -64;
weight scale 0.6 / 127 = 0.0047244, codes [64 (63.5 to even), -127]; deq_scale = 0.015686 * 0.0047244 = 7.4109e-5;
quant_bias = round(0.1 / 7.4109e-5 + 64 * (64 - 127)) = 1349 - 4032 = -2683. q = [0, -32]; the product is 4064;
y = (4064 - 2683) * 7.4109e-5 = 0.10234, and the float layer says 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.arithmetic.integer_product import integer_product
from quant_core.arithmetic.scales import QMAX, divided, quantize, unpack_deq_scale

# The tensors of one layer under the last component of their names in a checkpoint; an absent one is None or missing.
Tensors = Mapping[str, Tensor | None]

# A token of zeros has the codes 0 whatever its scale is, as long as that is a number to divide by.
_SMALLEST = torch.finfo(torch.float32).tiny


def static_output(x: Tensor, tensors: Tensors, row: int | None = None) -> Tensor:
    """Return the output (..., O) of a static layer in x's dtype; row: which of the T rows, None when there is one."""
    found = [needed(tensors, name) for name in ("input_scale", "input_offset", "quant_bias", "deq_scale")]
    scale, offset, quant_bias_O, deq_scale_O = found if row is None else [tensor[row] for tensor in found]
    codes = quantize(x.to(torch.float32), scale.to(torch.float32), offset.to(torch.float32))
    points = _product(codes, tensors) + quant_bias_O
    return (points * unpack_deq_scale(deq_scale_O)).to(x.dtype)


def dynamic_output(x: Tensor, tensors: Tensors) -> Tensor:
    """Return the output (..., O) of a dynamic layer in x's dtype: each token symmetric in its own range."""
    exact = x.to(torch.float32)
    scale_N1 = divided(exact.abs().amax(dim=-1, keepdim=True), QMAX).clamp(min=_SMALLEST)
    codes = quantize(exact, scale_N1, qmin=-QMAX)
    weight_scale_O = needed(tensors, "weight_scale").to(torch.float32).squeeze(-1)
    y = _product(codes, tensors) * scale_N1 * weight_scale_O
    bias_O = tensors.get("bias")
    return (y if bias_O is None else y + bias_O).to(x.dtype)


def needed(tensors: Tensors, name: str) -> Tensor:
    """Return a tensor that every layer of the scheme has."""
    tensor = tensors[name]
    assert tensor is not None, f"a deployed layer has its {name}"
    return tensor


def _product(codes: Tensor, tensors: Tensors) -> Tensor:
    """Return the integer product (..., O) int32 of whole numbers (..., I) in a float dtype with the weight's codes."""
    w_OI = needed(tensors, "weight")
    x_NI = codes.to(torch.int8).reshape(-1, w_OI.shape[1])
    return integer_product(x_NI, w_OI).reshape(*codes.shape[:-1], w_OI.shape[0])
