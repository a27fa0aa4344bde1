"""What the runtime uses of a sound checkpoint, ignores or cannot do with it, in words (spec: how it computes).

A row is a name and what makes its sentences of a checkpoint; none of it is wrong, and all of it was a surprise to
somebody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from launcher.files.manifest import TimestepPolicy
from launcher.inspection.published import Published, RankCheckpoint
from quant_core.schemes import BY_TYPE
from quant_core.schemes.scheme import Inputs

_STATIC = (Inputs.RANGE, Inputs.RANGE_PER_STEP)


class Word(NamedTuple):
    """What the runtime does with a part of a checkpoint: `used`, `ignored`, `refused` or `yours` (left to its user)."""

    kind: str
    text: str


def words(published: Published) -> list[Word]:
    """Return all that is to be said of a checkpoint."""
    return [word for say in _SAY for word in say(published.ranks[0])]


def _layers(rank: RankCheckpoint) -> Iterator[Word]:
    for kind in dict.fromkeys(group.type for group in rank.inventory.layers.values()):
        own = [group for group in rank.inventory.layers.values() if group.type == kind]
        smoothed = sum("mul_scale" in group.members for group in own)
        remark = f", {smoothed} with a factor on their input" if smoothed else ""
        yield Word("used", f"{len(own)} layers as {kind}{remark}")


def _floats(rank: RankCheckpoint) -> Iterator[Word]:
    if rank.inventory.floats:
        count = len(rank.inventory.floats)
        yield Word("ignored", f"{count} FLOAT tensors are never loaded: the model must hold the same ones already")
    yield Word("ignored", "weight_offset has no reader, and in static layers neither have weight_scale and bias")


def _attention(rank: RankCheckpoint) -> Iterator[Word]:
    if rank.inventory.attentions:
        count = len(rank.inventory.attentions)
        yield Word("ignored", f"the scales of {count} attentions (FAQuant) have no reader in MindIE-SD 3.0 and 3.1")


def _steps(rank: RankCheckpoint) -> Iterator[Word]:
    timesteps, first = rank.inventory.timesteps, rank.checkpoint.timestep_sep
    if timesteps is None or first is None:
        return
    if first == timesteps:
        yield Word("ignored", f"all {timesteps} rows: every step is to run dynamic")
        return
    yield Word("yours", f"register steps {first} to {timesteps - 1}, or every step runs dynamic without a word:")
    for version, line in TimestepPolicy.of(timesteps, first).registration.items():
        yield Word("yours", f"  MindIE-SD {version}: {line}")
    yield Word("yours", f"call TimestepManager.set_timestep_idx(i) before each step, i from 0 to {timesteps - 1}")
    if first:
        yield Word("ignored", f"the rows of steps 0 to {first - 1}, which run dynamic")


def _dtypes(rank: RankCheckpoint) -> Iterator[Word]:
    dtype, kinds = rank.inventory.dtype, {group.type for group in rank.inventory.layers.values()}
    is_static = any(BY_TYPE[kind].inputs in _STATIC for kind in kinds)
    if is_static and dtype == torch.bfloat16:
        yield Word("used", "in a bfloat16 run of MindIE-SD 3.1")
        yield Word("refused", "static layers in a bfloat16 run of 3.0: its operators take no int8 zero points there")
        yield Word("used", "in a float16 run, with deq_scale cut to 19 bits")
    elif is_static:
        yield Word("used", "in a float16 run, whose hardware reads 19 bits of deq_scale: outputs off by up to 0.1 %")
        yield Word("refused", "a bfloat16 run: deq_scale is stored in the form of a float16 run (int64)")
    if dtype == torch.float32:
        yield Word("used", "scales and biases, stored in float32, are rounded to the dtype of the run")


_SAY: tuple[Callable[[RankCheckpoint], Iterator[Word]], ...] = (_layers, _steps, _attention, _floats, _dtypes)
