"""W8A8_TIMESTEP: a static activation range per layer and denoising step; row t of each tensor is step t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quant_core.schemes.scheme import Scheme, SchemeConfig, W8A8QuantConfig, weight_tensors
from quant_core.schemes.w8a8 import static_row

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics
    from quant_core.schemes.quantized_layer import QuantizedLayer


class W8A8TimeStepQuantConfig(W8A8QuantConfig):
    """Choose how the per-timestep scheme finds its activation ranges."""


class W8A8TimeStepProcessorConfig(SchemeConfig):
    """Quantize with one static activation range per layer and denoising step.

    `timestep_sep`: steps below it are to run dynamic, the others static; half the steps when left out.
    """

    key: ClassVar[str] = "w8a8_timestep"
    timestep_sep: int | None = Field(default=None, ge=0)


def layer_tensors(layer: QuantizedLayer, steps: Sequence[int | None], numerics: Numerics) -> dict[str, Tensor]:
    """Return the static tensors of every step, stacked: input_scale, input_offset (T, 1), the others (T, O)."""
    import torch

    rows = [static_row(layer, step, numerics) for step in steps]
    return weight_tensors(layer) | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


SCHEME = Scheme(
    W8A8TimeStepProcessorConfig, "W8A8_TIMESTEP", observes_input=True, per_step=True, layer_tensors=layer_tensors
)
