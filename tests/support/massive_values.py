"""Tiny float transformers whose attentions have massive channels of values, and what rotates those."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model_adapters import load_adapter
from quant_core.attention.rotated_values import Rotations, find_rotations, levelled
from quant_core.naming import linear_at, linear_names
from quant_core.parallel.groups import Parallel
from tests.support.tiny_models import HEAD_DIM, HEADS, KINDS, build

# Channel of every head, and how much larger it is, and smaller the columns that read it: the function stays.
CHANNEL, GAIN = 3, 60.0


@torch.no_grad()
def with_massive_values(kind: str, seed: int = 0) -> Any:
    """Build a transformer with a massive channel in each head."""
    model = build(kind, seed)
    structure = load_adapter(KINDS[kind][0]).structure
    for name, rotation in find_rotations(model, structure, targets=linear_names(model)).linears.items():
        linear = linear_at(model, name)
        if rotation.columns is None:
            linear.weight[CHANNEL::HEAD_DIM] *= GAIN
            linear.bias[CHANNEL::HEAD_DIM] *= GAIN
        else:
            linear.weight[:, CHANNEL : HEADS * HEAD_DIM : HEAD_DIM] /= GAIN
    return model


def rotations_of(kind: str, model: nn.Module, parallel: Parallel | None = None) -> Rotations:
    """Return how a session on all linears of the model, or of a rank's part, would rotate it."""
    structure = load_adapter(KINDS[kind][0]).structure
    found = find_rotations(model, structure, targets=linear_names(model), parallel=parallel)
    return levelled(model, found, model.get_parameter, parallel=parallel)
