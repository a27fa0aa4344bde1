"""W8A8_TIMESTEP: a static activation range per layer and denoising step; row t of each tensor is step t.

The runtime runs steps below `timestep_sep` dynamic and the others static, each with its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_core.errors import ConfigurationError
from quant_core.schemes.scheme import Call, Derivation, Inputs, PerStepConfig, Scheme, W8A8QuantConfig, weight_tensors
from quant_core.schemes.tensor_rules import STATIC_RULES, WEIGHT_RULES, per_step
from quant_core.schemes.w8a8 import static_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.runtime import Tensors
    from quant_core.schemes.quantized_layer import QuantizedLayer


class W8A8TimeStepQuantConfig(W8A8QuantConfig):
    """Choose how the per-timestep scheme finds its activation ranges."""


class W8A8TimeStepProcessorConfig(PerStepConfig):
    """Quantize with one static activation range per layer and denoising step."""

    key: ClassVar[str] = "w8a8_timestep"


def layer_tensors(layer: QuantizedLayer, given: Derivation) -> dict[str, Tensor]:
    """Return the tensors of the weight and a row for each step: input_scale, input_offset (T, 1), the others (T, O)."""
    static = static_tensors(layer, given)
    return weight_tensors(layer, given) | static


def output(x: Tensor, tensors: Tensors, call: Call) -> Tensor:
    """Return the dynamic output below `timestep_sep`, then the static one of the step's row.

    Raises ConfigurationError when the step is unknown or has no row.
    """
    from quant_core.arithmetic.runtime import dynamic_output, needed, static_output

    rows = len(needed(tensors, "input_scale"))
    if call.step is None or not 0 <= call.step < rows:
        raise _no_row(call, rows)
    assert call.timestep_sep is not None, "whoever deploys a scheme that knows the step says where static ones begin"
    return dynamic_output(x, tensors) if call.step < call.timestep_sep else static_output(x, tensors, call.step)


def _no_row(call: Call, rows: int) -> ConfigurationError:
    return ConfigurationError(
        "the denoising step is unknown" if call.step is None else f"denoising step {call.step} has no scales",
        where=f"layer {call.layer}, {SCHEME.quant_type} with {rows} steps",
        why=f"each step has a row of scales of its own, 0 to {rows - 1}",
        advice="call TimestepManager.set_timestep_idx(i) in each step, and run no more steps than were calibrated",
    )


SCHEME = Scheme(
    config=W8A8TimeStepProcessorConfig,
    summary="one static activation range per layer and denoising step",
    inputs=Inputs.RANGE_PER_STEP,
    rules={**WEIGHT_RULES, **per_step(STATIC_RULES)},
    layer_tensors=layer_tensors,
    output=output,
    least_outputs=2,  # it squeezes the scales, and one that is left has no axis any more
)
