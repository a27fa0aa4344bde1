"""Measure how far a quantized model is from the float one: signal-to-quantization-noise ratios in decibels.

A layer's ratio is that of the layer alone: what its deployed arithmetic makes of the float model's own input, against
the float model's output. The output's ratio is that of the whole: all quantized layers one behind the other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from quant_core.attention.rotated_values import rotation_of
from quant_core.calibration.records import Record
from quant_core.calibration.replay import replay
from quant_core.layers.deployed import DeployedLinear
from quant_core.quality.replayed import LayerOutput, compare_layers, compare_outputs, kept_outputs


@dataclass(frozen=True)
class Quality:
    """What was measured, in decibels: each quantized layer by itself, and the model's output."""

    layers: dict[str, float]
    output: float

    @property
    def median_layer(self) -> float:
        """Return the ratio that half of the layers reach."""
        return median(self.layers.values())

    @property
    def worst_layer(self) -> float:
        """Return the ratio that all layers reach."""
        return min(self.layers.values())


@torch.no_grad()
def measure(floating: nn.Module, deployed: nn.Module, records: Sequence[Record]) -> Quality:
    """Compare a deployed model with the float model that it was made from, on the records.

    Both run in their own dtype, as they would be served; what one layer makes of its input is compared in float32.
    """
    targets = {
        name: copy.deepcopy(module).float()
        for name, module in deployed.named_modules()
        if isinstance(module, DeployedLinear)
    }
    with kept_outputs(floating) as exact:
        replay(floating, records, stage="measure")
    layers = compare_layers(floating, targets, lambda name: _seen_by_float(targets[name]), records)
    output = compare_outputs(deployed, records, exact)
    return Quality({name: ratios.overall.decibels for name, ratios in layers.items()}, output.overall.decibels)


def _seen_by_float(layer: nn.Module) -> LayerOutput:
    """Return what a deployed layer makes, in the channels of the float model if it was rotated."""
    rotation = rotation_of(layer)
    return lambda x, step: layer(x) if rotation is None else rotation.output(layer(rotation.input(x)))
