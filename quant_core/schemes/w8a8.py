"""W8A8: one static activation range per layer, with the offset and the bias folded into integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_core.schemes.scheme import Call, Derivation, Inputs, Scheme, SchemeConfig, weight_tensors
from quant_core.schemes.tensor_rules import STATIC_RULES, WEIGHT_RULES

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.runtime import Tensors
    from quant_core.schemes.quantized_layer import QuantizedLayer


class W8A8ProcessorConfig(SchemeConfig):
    """Quantize with one static activation range per layer."""

    key: ClassVar[str] = "w8a8"


def layer_tensors(layer: QuantizedLayer, given: Derivation) -> dict[str, Tensor]:
    """Return the weight's tensors and the static ones: input_scale, input_offset (1,), quant_bias, deq_scale (O,)."""
    static = static_tensors(layer, given)
    return weight_tensors(layer, given) | {name: rows[0] for name, rows in static.items()}


def static_tensors(layer: QuantizedLayer, given: Derivation) -> dict[str, Tensor]:
    """Return the input's scales and offsets (T, 1), and what makes the integer product the output (T, O), of T steps.

    `y = (q_x @ codes.T + quant_bias) * deq_scale` (spec: static activations). Rows of the weight whose scale is too
    small for their bias get a larger one first.
    """
    import torch

    from quant_core.arithmetic.scales import pack_deq_scale

    if layer.observer is None:
        raise AssertionError(f"{layer.name} was quantized without an observer")
    dtype, numerics = layer.weight_scale_O1.dtype, given.numerics
    found = [numerics.input_scale(*layer.observer.range(step), dtype) for step in given.steps]
    # A rank that shares records may have seen some steps itself, on its device, and know others from the host.
    scale_T1, offset_T1 = (torch.stack([part.cpu() for part in parts]) for parts in zip(*found))
    layer.make_room_for_bias(scale_T1, numerics, given.scale_group)
    deq_scale_TO = numerics.deq_scale(scale_T1, layer.weight_scale_O1.cpu())
    bias_O = None if layer.bias_O is None else layer.bias_O.cpu()
    return {
        "input_scale": scale_T1,
        "input_offset": offset_T1,
        "quant_bias": numerics.quant_bias(bias_O, deq_scale_TO, layer.codes_OI, offset_T1),
        "deq_scale": pack_deq_scale(deq_scale_TO, dtype),
    }


def output(x: Tensor, tensors: Tensors, call: Call) -> Tensor:
    """Return the integer product of the input's codes, dequantized."""
    from quant_core.arithmetic.runtime import static_output

    return static_output(x, tensors)


SCHEME = Scheme(
    config=W8A8ProcessorConfig,
    summary="one static activation range per layer",
    inputs=Inputs.RANGE,
    rules={**WEIGHT_RULES, **STATIC_RULES},
    layer_tensors=layer_tensors,
    output=output,
)
