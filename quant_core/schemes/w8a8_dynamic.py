"""W8A8_DYNAMIC: weights in 8 bits; the runtime measures and quantizes each token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.layers.calibrated import QuantizedLayer
from quant_core.schemes.scheme import Scheme, weight_tensors


def layer_tensors(layer: QuantizedLayer, steps: Sequence[int | None], numerics: Numerics) -> dict[str, Tensor]:
    """Return codes, float bias and weight scale (spec: dynamic)."""
    return weight_tensors(layer)


SCHEME = Scheme("W8A8_DYNAMIC", observes_input=False, per_step=False, layer_tensors=layer_tensors)
