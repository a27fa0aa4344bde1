"""W8A8_DYNAMIC: weights in 8 bits; the runtime measures and quantizes each token (spec: dynamic)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_core.schemes.scheme import Call, Inputs, Scheme, SchemeConfig, W8A8QuantConfig
from quant_core.schemes.tensor_rules import WEIGHT_RULES

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.runtime import Tensors


class W8A8DynamicQuantConfig(W8A8QuantConfig):
    """Configure the dynamic scheme, which measures activations at run time."""


class W8A8DynamicProcessorConfig(SchemeConfig):
    """Quantize weights; activations are quantized per token at run time."""

    key: ClassVar[str] = "w8a8_dynamic"


def output(x: Tensor, tensors: Tensors, call: Call) -> Tensor:
    """Return the integer product of each token's codes, dequantized, and the float bias."""
    from quant_core.arithmetic.runtime import dynamic_output

    return dynamic_output(x, tensors)


SCHEME = Scheme(
    config=W8A8DynamicProcessorConfig,
    summary="activations quantized token by token at run time",
    inputs=Inputs.TOKENS,
    rules=WEIGHT_RULES,
    output=output,
    with_attention=True,
    least_outputs=2,  # it squeezes the scales, and one that is left has no axis any more
    cost=1.15,  # static needs one quantizing kernel; this measures each token first
)
