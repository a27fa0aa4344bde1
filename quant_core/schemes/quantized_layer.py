"""What quantization knows of one linear layer, from its codes to the tensors of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.calibration.observers import InputObserver
from quant_core.parallel.groups import Group, reduce_over
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

    def make_room_for_bias(self, input_scale_T1: Tensor, numerics: Numerics, scale_group: Group | None) -> None:
        """Give rows whose bias would not fit in the integer product a larger scale, and the codes that go with it.

        input_scale_T1: of all steps, on the host. scale_group: ranks that share the row's scale; each has to ask, also
        one whose part has no bias. The reference numerics lets such a bias overflow, as the reference tool does.
        """
        if numerics.is_reference:
            return
        least_O1 = torch.zeros(len(self.codes_OI), 1)
        if self.bias_O is not None:
            least_O1 = numerics.least_weight_scale(self.bias_O.cpu(), input_scale_T1)
        least_O1 = reduce_over(scale_group, "max", least_O1)
        self.codes_OI, self.weight_scale_O1 = self.scheme.codec.coarsen(self.codes_OI, self.weight_scale_O1, least_O1)
