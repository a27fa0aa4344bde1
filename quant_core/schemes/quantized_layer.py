"""What quantization knows of one linear layer, from its codes to the tensors of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quant_core.calibration.observers import InputObserver
from quant_core.schemes.scheme import Scheme


@dataclass
class QuantizedLayer:
    """Hold what quantization knows of one linear layer.

    codes_OI: int8, on the host; weight_scale_O1 and bias_O in the model's dtype; mul_scale_I multiplies the input of a
    smoothed layer; observer watches the input of a static one; tensors: what the checkpoint holds, once known.
    """

    name: str
    scheme: Scheme
    codes_OI: Tensor
    weight_scale_O1: Tensor
    bias_O: Tensor | None = None
    mul_scale_I: Tensor | None = None
    observer: InputObserver | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
