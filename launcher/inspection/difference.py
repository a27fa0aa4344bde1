"""Compare two published checkpoints: what they were asked for, what their layers are, and how far apart they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.inspection.published import Published, RankCheckpoint, read_published
from launcher.inspection.rank_rules import tensor_names
from quant_core.errors import InputError
from quant_core.quality.ratio import LIMIT_DB, Ratio, compare

# So many changes are listed one by one.
SHOWN = 20
# A block's number in a layer's name; all but the last part of a tensor's.
_BLOCK, _OWNER = re.compile(r"(?<=\.)\d+(?=\.)"), re.compile(r".*(?=\.)")
_VALUES = re.compile(r"\d+ of \d+ values differ")


@dataclass
class Difference:
    """What differs between A and B.

    options: by field, both values. layers: by name, both types. tensors: by rank and name, in words. weights: by
    layer, the SQNR of B's weight against A's, over all ranks.
    """

    options: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    layers: dict[str, tuple[str, str]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Ratio] = field(default_factory=dict)

    @property
    def is_none(self) -> bool:
        """Tell whether the two are the same."""
        return not (self.options or self.layers or self.tensors)

    def as_plain(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "same": self.is_none,
            "options": {name: list(both) for name, both in self.options.items()},
            "layers": {name: list(both) for name, both in self.layers.items()},
            "tensors": self.tensors,
            "weights_sqnr_db": {name: round(ratio.decibels, 2) for name, ratio in self.weights.items()},
        }


def difference(one: Path, other: Path) -> Difference:
    """Compare the checkpoints in two folders.

    Raises InputError when one cannot be read or they are divided over other numbers of ranks.
    """
    a, b = _opened(one), _opened(other)
    if len(a.ranks) != len(b.ranks):
        raise InputError(
            "the checkpoints are divided over other numbers of ranks",
            where=f"{one}, {other}",
            why=f"{len(a.ranks)} ranks and {len(b.ranks)}: no part of one has its like in the other",
            advice="compare checkpoints of one tensor-parallel size",
        )
    found = Difference(
        options=_unequal(a.manifest.fields if a.manifest else {}, b.manifest.fields if b.manifest else {})
    )
    for ours, theirs in zip(a.ranks, b.ranks):
        found.layers |= _unequal(_types(ours), _types(theirs), absent="float")
        found.tensors |= dict(_tensors(ours, theirs))
        for name, ratio in _weights(ours, theirs):
            found.weights[name] = found.weights.get(name, Ratio()) + ratio
    return found


def _opened(folder: Path) -> Published:
    published = read_published(folder)
    for finding in published.findings:
        advice = f"python -m launcher verify {folder} tells all"
        raise InputError(finding.what, where=str(finding.file), why=finding.why, advice=advice)
    return published


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], absent: Any = "(absent)") -> dict[str, tuple[Any, Any]]:
    both = {name: (a.get(name, absent), b.get(name, absent)) for name in [*a, *(name for name in b if name not in a)]}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _types(rank: RankCheckpoint) -> dict[str, str]:
    rotations = rank.checkpoint.rotations
    return {
        name: group.type
        + (", smoothed" if "mul_scale" in group.members else "")
        + (", rotated" if name in rotations else "")
        for name, group in rank.inventory.layers.items()
    }


def _tensors(ours: RankCheckpoint, theirs: RankCheckpoint) -> Iterator[tuple[str, str]]:
    """Yield each tensor that only one has, or that is another, by rank and its name in the float model."""
    a, b = (dict(_named(rank)) for rank in (ours, theirs))
    for name in sorted(a.keys() | b.keys()):
        where = f"rank {ours.rank}: {name}"
        if name not in a or name not in b:
            yield where, f"only in {'B' if name in b else 'A'}"
            continue
        x, y = ours.checkpoint.read_raw(a[name]), theirs.checkpoint.read_raw(b[name])
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            yield where, f"{x.dtype} {tuple(x.shape)} -> {y.dtype} {tuple(y.shape)}"
        elif not torch.equal(x, y):
            yield where, f"{int((x != y).sum())} of {x.numel()} values differ"


def _named(rank: RankCheckpoint) -> Iterator[tuple[str, str]]:
    yield from ((f"{layer}.{tensor}" if layer else tensor, full) for layer, tensor, full in tensor_names(rank))
    for group in rank.inventory.attentions.values():
        yield from ((full, full) for full in group.members.values())


def _weights(ours: RankCheckpoint, theirs: RankCheckpoint) -> Iterator[tuple[str, Ratio]]:
    for name, group in ours.inventory.layers.items():
        other = theirs.inventory.layers.get(name)
        if other is None:
            continue
        shapes = (ours.checkpoint.info(group.members["weight"]), theirs.checkpoint.info(other.members["weight"]))
        if shapes[0] == shapes[1]:
            yield name, compare(_weight(ours, name), _weight(theirs, name))


def _weight(rank: RankCheckpoint, name: str) -> Tensor:
    """Return what a layer's codes stand for, with smoothing and rotation undone."""
    weight, rotation = rank.checkpoint.read_weight(name), rank.checkpoint.rotations.get(name)
    return weight if rotation is None else rotation.unchanged(weight)


def told(found: Difference, one: Path, other: Path) -> Iterator[str]:
    """Yield the difference as lines for a terminal; what is alike in many layers is one line with their number."""
    yield f"A {one}"
    yield f"B {other}"
    layers = {name: f"{a} -> {b}" for name, (a, b) in found.layers.items()}
    for title, changes in (
        ("options", {name: f"{a} -> {b}" for name, (a, b) in found.options.items()}),
        ("layers", _alike(layers, _BLOCK)),
        ("tensors", _alike(found.tensors, _OWNER)),
    ):
        count = len(getattr(found, title))
        yield f"{title}: {count} differ{'s' * (count == 1)}{' (each one: --json)' if len(changes) < count else ''}"
        yield from (f"  {name}: {what}" for name, what in changes.items())
    worst = sorted(found.weights, key=lambda name: found.weights[name].decibels)
    unequal = [name for name in worst if found.weights[name].decibels < LIMIT_DB]
    yield f"weights: {len(unequal)} of {len(worst)} layers differ; SQNR of B against A:"
    yield from (f"  {found.weights[name].decibels:7.1f} dB  {name}" for name in unequal)
    yield "the same" if found.is_none else "not the same"


def _alike(changes: Mapping[str, str], pattern: re.Pattern[str]) -> Mapping[str, str]:
    """Return many changes by their names with a star for what the pattern finds, and the number of each.

    How many values differ is left out then.
    """
    if len(changes) <= SHOWN:
        return changes
    counts = Counter(
        (pattern.sub("*", name, count=1), _VALUES.sub("values differ", what)) for name, what in changes.items()
    )
    return {f"{count:4} {name}": what for (name, what), count in counts.items()}
