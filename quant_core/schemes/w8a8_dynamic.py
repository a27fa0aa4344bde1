"""W8A8_DYNAMIC: weights in 8 bits; the runtime measures and quantizes each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from quant_core.schemes.scheme import Scheme, SchemeConfig, W8A8QuantConfig, weight_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics
    from quant_core.schemes.quantized_layer import QuantizedLayer


class W8A8DynamicQuantConfig(W8A8QuantConfig):
    """Configure the dynamic scheme, which measures activations at run time."""


class W8A8DynamicProcessorConfig(SchemeConfig):
    """Quantize weights; activations are quantized per token at run time."""

    key: ClassVar[str] = "w8a8_dynamic"


def layer_tensors(layer: QuantizedLayer, steps: Sequence[int | None], numerics: Numerics) -> dict[str, Tensor]:
    """Return codes, float bias and weight scale (spec: dynamic)."""
    return weight_tensors(layer)


SCHEME = Scheme(
    W8A8DynamicProcessorConfig, "W8A8_DYNAMIC", observes_input=False, per_step=False, layer_tensors=layer_tensors
)
