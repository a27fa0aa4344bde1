"""Measure how far a quantized model is from the float one: signal-to-quantization-noise ratios in decibels.

A layer's ratio is that of the layer alone: what its deployed arithmetic makes of the float model's own input, against
the float model's output. The output's ratio is that of the whole: all quantized layers one behind the other.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.calibration.records import Record
from quant_core.calibration.replay import replay
from quant_core.layers.deployed import DeployedLinear


@dataclass
class Ratio:
    """Add up signal and noise over calls."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        """Take in one call; both of one shape."""
        self.signal += exact.double().square().sum().item()
        self.noise += (exact.double() - approximate.double()).square().sum().item()

    @property
    def decibels(self) -> float:
        """Return 10 log10 of signal over noise."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


@dataclass(frozen=True)
class Quality:
    """What was measured, in decibels: each quantized layer by itself, and the model's output."""

    layers: dict[str, float]
    output: float

    @property
    def median_layer(self) -> float:
        """Return the ratio that half of the layers reach."""
        return median(self.layers.values())


@torch.no_grad()
def measure(floating: nn.Module, deployed: nn.Module, records: Sequence[Record]) -> Quality:
    """Compare a deployed model with the float model that it was made from, on the records.

    Both run in their own dtype, as they would be served. What one layer makes of its input is compared in float32, so
    that rounding the result to a narrow dtype does not hide it; codes and stored scales keep their values.
    """
    ratios: defaultdict[str, Ratio] = defaultdict(Ratio)
    targets = {name: module for name, module in deployed.named_modules() if isinstance(module, DeployedLinear)}
    hooks = [
        floating.get_submodule(name).register_forward_hook(_comparing(copy.deepcopy(target).float(), ratios[name]))
        for name, target in targets.items()
    ]
    exact = _outputs(floating, records)
    for hook in hooks:
        hook.remove()
    whole = Ratio()
    for expected, output in zip(exact, _outputs(deployed, records)):
        whole.add(expected, output)
    return Quality({name: ratio.decibels for name, ratio in ratios.items()}, whole.decibels)


def _comparing(deployed: nn.Module, ratio: Ratio) -> Callable[[Any, Any, Any], None]:
    """Return a forward hook that compares a float linear with its deployed one, in float32."""

    def compare(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].float()
        bias_O = None if linear.bias is None else linear.bias.float()
        ratio.add(F.linear(x, linear.weight.float(), bias_O), deployed(x))

    return compare


def _outputs(model: nn.Module, records: Sequence[Record]) -> list[Tensor]:
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    replay(model, records, stage="measure")
    hook.remove()
    return outputs
