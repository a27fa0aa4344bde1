"""A linear layer while it is calibrated: still the module it was, with its weight quantized in place.

The class of the module is exchanged, not the module: its name, parameters and hooks stay, so a tensor-parallel
collective that hangs on it keeps working (spec: running on many ranks, failing and finishing together).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.arithmetic.blocks import Rows
from quant_core.arithmetic.numerics import Numerics
from quant_core.arithmetic.scales import fake_quantize_tokens
from quant_core.calibration.finite import check_part
from quant_core.layers.rescaling import RescaledRows, Rescaling
from quant_core.parallel.groups import Group, reduce_over
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Inputs, Scheme


class CalibratedLinear(nn.Linear):
    """Compute with the fake-quantized weight, and show the input to the layer's observer."""

    layer: QuantizedLayer

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output; input: (..., in_features)."""
        if self.layer.mul_scale_I is not None:
            input = input * self.layer.mul_scale_I.to(input.device)
        if self.layer.observer is not None:
            input = self.layer.observer.observe(input)
        elif self.layer.scheme.inputs is Inputs.TOKENS:
            # As the runtime will, so that the layers behind are calibrated with what they will see.
            input = fake_quantize_tokens(input)
        return F.linear(input, self.weight, self.bias)


@torch.no_grad()
def quantize_linear(linear: nn.Linear, layer: QuantizedLayer, *, runs: bool) -> None:
    """Make a linear a `CalibratedLinear`, and move the layer's codes to the host.

    runs: whether records will be replayed through the layer; if not, its codes take the place of the weight at once.
    """
    if not runs:
        linear.weight = nn.Parameter(layer.codes_OI, requires_grad=False)
    if layer.bias_O is not None:
        linear.bias.data.copy_(layer.bias_O)
        layer.bias_O = linear.bias.detach()
    layer.codes_OI = layer.codes_OI.cpu()
    linear.__class__ = CalibratedLinear
    linear.layer = layer  # type: ignore[assignment]


@torch.no_grad()
def encode_linear(
    name: str,
    linear: nn.Linear,
    scheme: Scheme,
    numerics: Numerics,
    *,
    scale_group: Group | None = None,
    rescaling: Rescaling | None = None,
    fake_OI: Tensor | None = None,
) -> QuantizedLayer:
    """Return what a linear is, quantized, its codes where the weight is.

    scale_group: ranks over which the row maxima must agree. rescaling: what smoothing does to the layer first. fake_OI:
    takes the weight that the codes stand for, and may be the linear's own; without it, nothing of the linear changes.
    Raises InputError for a weight that is not finite.
    """
    float_OI, mul_scale_I = linear.weight.detach(), None
    bias_O = None if linear.bias is None else linear.bias.detach()
    w_OI: Rows = float_OI
    if rescaling is not None:
        w_OI, mul_scale_I = RescaledRows(float_OI, rescaling, numerics), rescaling.mul_scale_I
        bias_O = None if bias_O is None else rescaling.bias(bias_O)
    amax_O1 = scheme.codec.row_maxima(w_OI)
    check_part(name, "weight", amax_O1)
    if bias_O is not None:
        check_part(name, "bias", bias_O)
    amax_O1 = reduce_over(scale_group, "max", amax_O1)
    weight = scheme.codec.encode(w_OI, amax_O1, float_OI.dtype, numerics, fake_OI=fake_OI)
    return QuantizedLayer(name, scheme, weight.codes, weight.scale, bias_O, mul_scale_I)
