"""What a quantization scheme is: which statistics it needs, and which tensors it makes of them.

A command line reads the table of schemes for its help and has to answer at once, so no module of a scheme imports torch
before something is computed: what computes imports it inside its function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from quant_core.processor import ProcessorConfig, StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics
    from quant_core.schemes.quantized_layer import QuantizedLayer

# layer, steps (or [None]), numerics -> tensors in the order of the checkpoint
LayerTensors = Callable[["QuantizedLayer", "Sequence[int | None]", "Numerics"], "dict[str, Tensor]"]

# The numbers that this family of tools has for the same estimators, in Python and on a command line.
_METHOD_NUMBERS = {1: "minmax", 2: "histogram", 3: "mix", "1": "minmax", "2": "histogram", "3": "mix"}
ActMethod = Annotated[
    Literal["minmax", "histogram", "mix", "percentile", "mse"],
    BeforeValidator(lambda value: _METHOD_NUMBERS.get(value, value) if isinstance(value, (int, str)) else value),
]


class W8A8QuantConfig(StrictModel):
    """Choose how a static scheme finds its activation ranges: `act_method`, by name or 1, 2, 3 (`estimators`)."""

    act_method: ActMethod = "minmax"


class SchemeConfig(ProcessorConfig):
    """Configure a quantization scheme.

    `disable_names`: linear layers to keep float, exact names or patterns.
    """

    kind: ClassVar[str] = "quantization scheme"
    cfg: W8A8QuantConfig = Field(default_factory=W8A8QuantConfig)
    disable_names: Sequence[str] = ()


@dataclass(frozen=True)
class Scheme:
    """Describe a scheme: its type in the description, what it observes, and how it makes a layer's tensors."""

    config: type[SchemeConfig]
    quant_type: str
    observes_input: bool
    per_step: bool
    layer_tensors: LayerTensors

    @property
    def name(self) -> str:
        """Return the name that a session and a command line know it by."""
        return self.config.key


def weight_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return what every scheme stores of the weight: codes, bias if there is one, scale, zero offset."""
    bias = {} if layer.bias_O is None else {"bias": layer.bias_O}
    scale_O1 = layer.weight_scale_O1
    offset_O1 = scale_O1.new_zeros(scale_O1.shape)
    return {"weight": layer.codes_OI, **bias, "weight_scale": scale_O1, "weight_offset": offset_O1}
