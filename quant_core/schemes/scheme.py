"""What a quantization scheme is: one row, from which every table, check, choice and help text is derived.

A command line reads the table of schemes for its help and has to answer at once, so no module of a scheme imports torch
before something is computed: what computes imports it inside its function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from quant_core.arithmetic.weight_codec import INT8_ROWS, Int8Rows
from quant_core.processor import ProcessorConfig, StrictModel
from quant_core.schemes.tensor_rules import TensorRules

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics
    from quant_core.arithmetic.runtime import Tensors
    from quant_core.parallel.groups import Group
    from quant_core.schemes.quantized_layer import QuantizedLayer

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

    `disable_names`: linear layers to keep float, exact names or patterns. `smoothed`: whether outlier suppression, if
    the session has one, changes these layers.
    """

    kind: ClassVar[str] = "quantization scheme"
    cfg: W8A8QuantConfig = Field(default_factory=W8A8QuantConfig)
    disable_names: Sequence[str] = ()
    smoothed: bool = True


class PerStepConfig(SchemeConfig):
    """Configure a scheme that knows the denoising step.

    `timestep_sep`: steps below it are to run dynamic, the others static; half the steps when left out.
    """

    timestep_sep: int | None = Field(default=None, ge=0)


class Inputs(Enum):
    """What becomes of a layer's input: left float, measured token by token at run time, or in calibrated ranges."""

    FLOAT = "float"
    TOKENS = "tokens"
    RANGE = "one range"
    RANGE_PER_STEP = "a range per step"


class Call(NamedTuple):
    """Say where a deployed layer is called.

    layer: its name, for errors. step: index of the denoising step, if any. timestep_sep: the first static step of a
    scheme that knows the step.
    """

    layer: str
    step: int | None
    timestep_sep: int | None


class Derivation(NamedTuple):
    """Say what a layer's tensors follow from besides the layer.

    steps: the denoising steps that have a range, or [None]. scale_group: ranks that share the layer's scales.
    """

    steps: Sequence[int | None]
    numerics: Numerics
    scale_group: Group | None = None


def weight_tensors(layer: QuantizedLayer, given: Derivation) -> dict[str, Tensor]:
    """Return what every scheme stores of the weight: codes, bias if there is one, scale, zero offset."""
    bias = {} if layer.bias_O is None else {"bias": layer.bias_O}
    scale_O1 = layer.weight_scale_O1
    offset_O1 = scale_O1.new_zeros(scale_O1.shape)
    return {"weight": layer.codes_OI, **bias, "weight_scale": scale_O1, "weight_offset": offset_O1}


@dataclass(frozen=True)
class Scheme:
    """Describe a scheme.

    config: its processor, whose key names it in a session and on a command line, and in capitals in a description.
    summary: for the help. inputs: what becomes of a layer's input. rules: the tensors of a layer; layer_tensors: makes
    them, in the checkpoint's order. output: what the runtime makes of an input (..., I) and the stored tensors,
    (..., O) in the input's dtype. codec: how weights become codes. multiplies_input: the runtime multiplies a smoothed
    layer's input. with_attention: attention scales may go with it. least_outputs: the runtime loads a layer of fewer,
    and fails when it computes. cost: how long a layer takes, where a static one takes 1; nobody measured it on a card.
    """

    config: type[SchemeConfig]
    summary: str
    inputs: Inputs
    rules: TensorRules
    output: Callable[[Tensor, Tensors, Call], Tensor]
    layer_tensors: Callable[[QuantizedLayer, Derivation], dict[str, Tensor]] = weight_tensors
    codec: Int8Rows = INT8_ROWS
    multiplies_input: bool = True
    with_attention: bool = False
    least_outputs: int = 1
    cost: float = 1.0

    @property
    def name(self) -> str:
        """The name in a session and on a command line."""
        return self.config.key

    @property
    def quant_type(self) -> str:
        """The type in a description; the consumer derives file names from it in lower case."""
        return self.name.upper()

    @property
    def per_step(self) -> bool:
        """Whether each denoising step has a range of its own."""
        return self.inputs is Inputs.RANGE_PER_STEP

    @property
    def observes_input(self) -> bool:
        """Whether calibration has to find ranges."""
        return self.inputs in (Inputs.RANGE, Inputs.RANGE_PER_STEP)


def separator(timestep_sep: int | None, timesteps: int) -> int:
    """Return the first static step of a scheme that knows the step: as asked, or half the steps."""
    return timesteps // 2 if timestep_sep is None else timestep_sep
