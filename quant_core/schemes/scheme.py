"""What a quantization scheme is: which statistics it needs, and which tensors it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.layers.calibrated import QuantizedLayer

# layer, steps (or [None]), numerics, dtype of the model -> tensors in the order of the checkpoint
LayerTensors = Callable[[QuantizedLayer, Sequence[int | None], Numerics], dict[str, Tensor]]


@dataclass(frozen=True)
class Scheme:
    """Describe a scheme: its type in the description, what it observes, and how it makes a layer's tensors."""

    quant_type: str
    observes_input: bool
    per_step: bool
    layer_tensors: LayerTensors


def weight_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return what every scheme stores of the weight: codes, bias if there is one, scale, zero offset."""
    bias = {} if layer.bias_O is None else {"bias": layer.bias_O}
    scale_O1 = layer.weight_scale_O1
    return {"weight": layer.codes_OI, **bias, "weight_scale": scale_O1, "weight_offset": torch.zeros_like(scale_O1)}
