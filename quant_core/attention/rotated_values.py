"""Rotate the values of a model's attentions: which linears that changes, and why some attentions are left alone.

The rotation comes in front of everything that looks at activations or weights, outlier suppression too: that then
divides the rotated channels. All linears of an attention have to become quantized layers, because the runtime never
loads a float one, and a changed weight would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quant_core.arithmetic.rotation import Rotation, is_rotatable
from quant_core.attention.value_levels import Read, value_levels
from quant_core.calibration.replay import Progress, silent
from quant_core.errors import ConfigurationError, few
from quant_core.naming import inside, linear_at, matches
from quant_core.parallel.groups import Parallel
from quant_core.structure import NO_STRUCTURE, AttentionValues, ModelStructure


@dataclass(frozen=True)
class Rotations:
    """Say how each linear changes, by name; which of them each rotated attention has; which are left alone, and why."""

    linears: Mapping[str, Rotation] = field(default_factory=dict)
    attentions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def find_rotations(
    model: nn.Module, structure: ModelStructure | None, *, targets: Collection[str], parallel: Parallel | None = None
) -> Rotations:
    """Return what rotating the values changes, not levelled; the model may be on the meta device, or a rank's part.

    targets: the linears that will be quantized. An attention of which one linear stays float, or whose heads have no
    Hadamard matrix, is left alone whole. Raises ConfigurationError when none is left.
    """
    found: dict[str, Rotation] = {}
    attentions: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for attention, made_by, read_by in _declared_on(model, structure.values if structure else ()):
        head_size = linear_at(model, made_by[0]).out_features // _heads(model, attention)
        if reason := _reason_against(head_size, made_by, read_by, targets):
            skipped[attention] = reason
            continue
        attentions[attention] = (*made_by, *read_by)
        found |= dict.fromkeys(made_by, Rotation(head_size))
        for name in read_by:
            found[name] = Rotation(head_size, _width(model, made_by[0], name, parallel or Parallel()))
    if not found:
        raise _nothing_to_rotate(model, structure, skipped)
    return Rotations(found, attentions, skipped)


@torch.no_grad()
def levelled(
    model: nn.Module,
    rotations: Rotations,
    read: Read,
    *,
    parallel: Parallel | None = None,
    progress: Progress = silent,
) -> Rotations:
    """Return the rotations with the levels of the float model's channels; read: returns its tensors by full name.

    Linears that were rotated before keep what they have. All ranks that hold a part of the model have to come here.
    """
    found = dict(rotations.linears)
    for done, names in enumerate(rotations.attentions.values(), start=1):
        known = {name: rotation for name in names if (rotation := rotation_of(linear_at(model, name)))}
        if not known:
            levels = value_levels(model, {name: found[name].columns for name in names}, read, parallel or Parallel())
            known = {name: replace(found[name], levels=levels[name]) for name in names}
        found |= known
        progress("level", done, len(rotations.attentions))
    return replace(rotations, linears=found)


@torch.no_grad()
def rotate_values(model: nn.Module, rotations: Mapping[str, Rotation]) -> None:
    """Rotate the linears of a float model in place; one that was rotated before stays as it is.

    Raises ConfigurationError for a model in which others were rotated before, and nobody would say so.
    """
    others = [name for name, module in model.named_modules() if rotation_of(module) not in (None, rotations.get(name))]
    if others:
        raise ConfigurationError(
            "values of the model are rotated already",
            where=f"{type(model).__name__}: {len(others)} layers, first {others[0]}",
            why="a session changes its model, and this one would not rotate these layers",
            advice="load the float model again",
        )
    for name, rotation in rotations.items():
        linear = linear_at(model, name)
        if rotation_of(linear) is None:
            linear.weight.copy_(rotation.weight(linear.weight))
            if linear.bias is not None:
                linear.bias.copy_(rotation.bias(linear.bias))
            linear.rotation = rotation  # type: ignore[assignment]


def rotation_of(module: nn.Module) -> Rotation | None:
    """Return how a linear was rotated, None for one that was not."""
    # A model may call something of its own so.
    found = getattr(module, "rotation", None)
    return found if isinstance(found, Rotation) else None


def _declared_on(
    model: nn.Module, declared: Collection[AttentionValues]
) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield the attentions that the model has: name, linears that make its values, linears that read its output."""
    modules = dict(model.named_modules())

    def linears(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
        # Not every block has all: the last one of SD3 reads no text stream.
        found = (inside(block, name) for name in names)
        return tuple(name for name in found if isinstance(modules.get(name), nn.Linear))

    for block in modules:
        for values in declared:
            if matches(block, values.block) and (attention := inside(block, values.attention)) in modules:
                yield attention, linears(block, values.made_by), linears(block, values.read_by)


def _heads(model: nn.Module, attention: str) -> int:
    heads = model.get_submodule(attention).heads
    assert isinstance(heads, int), f"{attention}.heads is {heads}"
    return heads


def _reason_against(
    head_size: int, made_by: Collection[str], read_by: Collection[str], targets: Collection[str]
) -> str | None:
    if not is_rotatable(head_size):
        return f"heads of {head_size} channels, which is no power of two"
    kept_float = [name for name in (*made_by, *read_by) if name not in targets]
    return f"{', '.join(kept_float)} stays float" if kept_float else None


def _width(model: nn.Module, value: str, reader: str, parallel: Parallel) -> int:
    """Return how many of a reader's columns are the attention's output: of this rank's heads, or of all of them."""
    local, shard = linear_at(model, value).out_features, parallel.shard(value)
    is_whole = parallel.shard(reader).split_dim != 1 and shard.split_dim == 0
    return local * shard.size if is_whole else local


def _nothing_to_rotate(
    model: nn.Module, structure: ModelStructure | None, skipped: Mapping[str, str]
) -> ConfigurationError:
    otherwise = "its structure names no values of attentions" if structure else NO_STRUCTURE
    return ConfigurationError(
        f"no attention of {type(model).__name__} can be rotated",
        where="rotate_values",
        why=few(dict.fromkeys(skipped.values())) or otherwise,
        advice="quantize the linears around an attention too (disable_names, layer_schemes), or drop rotate_values",
    )
