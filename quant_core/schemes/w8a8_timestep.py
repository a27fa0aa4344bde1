"""W8A8_TIMESTEP: a static activation range per layer and denoising step; row t of each tensor is step t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.layers.calibrated import QuantizedLayer
from quant_core.schemes.scheme import Scheme, weight_tensors
from quant_core.schemes.w8a8 import static_row


def layer_tensors(layer: QuantizedLayer, steps: Sequence[int | None], numerics: Numerics) -> dict[str, Tensor]:
    """Return the static tensors of every step, stacked: input_scale, input_offset (T, 1), the others (T, O)."""
    rows = [static_row(layer, step, numerics) for step in steps]
    return weight_tensors(layer) | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


SCHEME = Scheme("W8A8_TIMESTEP", observes_input=True, per_step=True, layer_tensors=layer_tensors)
