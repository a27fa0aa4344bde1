"""Let the linears that make an input absorb its factor, so that nothing is left to multiply at run time.

Two kinds of linears make the inputs of a transformer block's groups. A modulation gives `norm(x) * (1 + g) + h`: with
its rows for h divided by s, and its rows for g mapped to `(1 + g) / s - 1`, the whole is divided by s. An attention's
output channel is a mean of the value channel of the same index, so the value's row divided by s divides the output.

Worked example, one channel with g = 0.5, h = 0.2, norm(x) = 2, s = 4: 2 * 1.5 + 0.2 = 3.2 before; after, h = 0.05 and
g = 1.5 / 4 - 1 = -0.625, so 2 * 0.375 + 0.05 = 0.8, a quarter.

What this gives up: the runtime loads quantized layers only, so a linear that stays float cannot absorb anything (its
changed weight would be lost without a word), and the two streams of a joint attention must share one factor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from quant_core.errors import ConfigurationError, few
from quant_core.layers.rescaling import Rescaling
from quant_core.naming import linear_at
from quant_core.smoothing.groups import LinearGroup
from quant_core.structure import Modulation


def check_fusible(model: nn.Module, groups: Iterable[LinearGroup], targets: Collection[str]) -> None:
    """Raise ConfigurationError with every reason why a factor could not be absorbed.

    targets: the linears that will be quantized.
    """
    problems = [problem for group in groups for problem in _problems(model, group, targets)]
    if problems:
        raise ConfigurationError(
            "smoothing factors cannot be fused",
            where="outlier suppression, fused",
            why="the runtime loads quantized layers only, and these cannot absorb a factor: " + few(problems),
            advice="quantize these layers too, keep the smoothed ones float, or drop fused (--anti_fused)",
        )


def _problems(model: nn.Module, group: LinearGroup, targets: Collection[str]) -> Iterator[str]:
    producers = (group.modulation.linear,) if group.modulation else group.values
    if not producers:
        yield f"nothing in the model makes the input of {group.name} and nothing else"
    for name in producers:
        if name not in targets:
            yield f"{name} (for {group.name}) stays float"
        elif group.modulation:
            yield from _modulation_problems(linear_at(model, name), group, linear_at(model, group.name).in_features)


def _modulation_problems(linear: nn.Linear, group: LinearGroup, width: int) -> Iterator[str]:
    assert group.modulation is not None, "asked for groups with a modulation"
    known = group.modulation.chunks
    if linear.out_features not in {count * width for count in known}:
        counts = " or ".join(map(str, known))
        yield f"{group.modulation.linear} makes {linear.out_features / width:g} chunks, and only {counts} are known"
    if linear.bias is None:
        yield f"{group.modulation.linear} (for {group.name}) has no bias to shift"


def absorb(model: nn.Module, group: LinearGroup, factor_I: Tensor) -> dict[str, Rescaling]:
    """Return how the linears that make a group's input change when it is divided by the factor."""
    if group.modulation is not None:
        return {
            group.modulation.linear: modulate(
                group.modulation, linear_at(model, group.modulation.linear).out_features, factor_I
            )
        }
    return {name: Rescaling(rows_O=1 / factor_I.to(torch.float32)) for name in group.values}


def modulate(modulation: Modulation, outputs: int, factor_I: Tensor) -> Rescaling:
    """Return the change of a modulation with that many outputs: shift rows / s, scale rows `(1 + g) / s - 1`."""
    width = len(factor_I)
    inverse_I = 1 / factor_I.to(torch.float32)
    rows_O, bias_shift_O = inverse_I.new_ones(outputs), inverse_I.new_zeros(outputs)
    shift, scale = (slice(place * width, (place + 1) * width) for place in modulation.chunks[outputs // width])
    rows_O[shift] = inverse_I
    rows_O[scale] = inverse_I
    bias_shift_O[scale] = inverse_I - 1
    return Rescaling(rows_O=rows_O, bias_shift_O=bias_shift_O)
