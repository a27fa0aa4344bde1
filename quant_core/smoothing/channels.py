"""How far a group's largest channel stands out of the others, before its input is divided by the factor and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.parallel.groups import Group, gather_rows


@dataclass(frozen=True)
class Channels:
    """Hold the largest |x| of the largest channel of an input, and that of the channel in the middle."""

    largest: float
    middle: float


@dataclass(frozen=True)
class SmoothedInput:
    """Name the linears that share a factor, and tell of their inputs' channels without it and with it."""

    layers: tuple[str, ...]
    before: Channels
    after: Channels


def smoothed_input(layers: tuple[str, ...], amax_I: Tensor, factor_I: Tensor, group: Group | None) -> SmoothedInput:
    """Summarize the channels of one input, over all ranks that hold some of them.

    amax_I: the largest |x| of each channel, before; factor_I: what divides it. group: of ranks that each hold other
    channels.
    """
    found_IC = torch.stack((amax_I.float(), amax_I.float() / factor_I.float()), dim=1)
    before_I, after_I = gather_rows(group, found_IC.cpu()).unbind(1)
    return SmoothedInput(layers, _channels(before_I), _channels(after_I))


def _channels(amax_I: Tensor) -> Channels:
    return Channels(float(amax_I.max()), float(amax_I.median()))
