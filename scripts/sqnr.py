"""Measure how far a quantized model is from the float one: signal-to-quantization-noise ratios in decibels.

A layer's ratio is that of the layer alone: what its deployed arithmetic makes of the float model's own input, against
the float model's output. The output's ratio is that of the whole: all quantized layers one behind the other.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quant_core.calibration.records import Record
from quant_core.calibration.replay import replay
from quant_core.deployed.linear import DeployedLinear


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

    Codes and stored scales keep their values when a deployed model is widened to float32.
    """
    floating, deployed = copy.deepcopy(floating).float(), copy.deepcopy(deployed).float()
    records = [Record(_widened(record.args), _widened(record.kwargs), record.step) for record in records]
    ratios: defaultdict[str, Ratio] = defaultdict(Ratio)
    targets = {name: module for name, module in deployed.named_modules() if isinstance(module, DeployedLinear)}

    def comparing(name: str) -> Any:
        return lambda module, args, output: ratios[name].add(output, targets[name](*args))

    hooks = [floating.get_submodule(name).register_forward_hook(comparing(name)) for name in targets]
    exact = _outputs(floating, records)
    for hook in hooks:
        hook.remove()
    whole = Ratio()
    for expected, output in zip(exact, _outputs(deployed, records)):
        whole.add(expected, output)
    return Quality({name: ratio.decibels for name, ratio in ratios.items()}, whole.decibels)


def _outputs(model: nn.Module, records: Sequence[Record]) -> list[Tensor]:
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    replay(model, records, stage="measure")
    hook.remove()
    return outputs


def _widened(arguments: Any) -> Any:
    """Return nested arguments with their floating tensors in float32."""
    return tree_map(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, arguments
    )
