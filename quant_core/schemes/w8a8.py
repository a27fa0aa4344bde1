"""W8A8: one static activation range per layer, with the offset and the bias folded into integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from quant_core.schemes.scheme import Scheme, SchemeConfig, weight_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics
    from quant_core.schemes.quantized_layer import QuantizedLayer


class W8A8ProcessorConfig(SchemeConfig):
    """Quantize with one static activation range per layer."""

    key: ClassVar[str] = "w8a8"


def layer_tensors(layer: QuantizedLayer, steps: Sequence[int | None], numerics: Numerics) -> dict[str, Tensor]:
    """Return the static tensors: input_scale, input_offset (1,), quant_bias, deq_scale (O,)."""
    return weight_tensors(layer) | static_row(layer, None, numerics)


def static_row(layer: QuantizedLayer, step: int | None, numerics: Numerics) -> dict[str, Tensor]:
    """Return the input's scale and offset in one step, and what the integer product needs to become the output.

    `y = (q_x @ codes.T + quant_bias) * deq_scale` (spec: static activations).
    """
    from quant_core.arithmetic.scales import pack_deq_scale

    if layer.observer is None:
        raise AssertionError(f"{layer.name} was quantized without an observer")
    dtype = layer.weight_scale_O1.dtype
    scale, offset = numerics.input_scale(*layer.observer.range(step), dtype)
    scale, offset = scale.cpu(), offset.cpu()
    deq_scale_O = numerics.deq_scale(scale, layer.weight_scale_O1.cpu())
    bias_O = None if layer.bias_O is None else layer.bias_O.cpu()
    return {
        "input_scale": scale,
        "input_offset": offset,
        "quant_bias": numerics.quant_bias(bias_O, deq_scale_O, layer.codes_OI, offset),
        "deq_scale": pack_deq_scale(deq_scale_O, dtype),
    }


SCHEME = Scheme(W8A8ProcessorConfig, "W8A8", observes_input=True, per_step=False, layer_tensors=layer_tensors)
