"""Find on a model the groups of linears that its structure declares, and decide which of them are smoothed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from quant_core.errors import ConfigurationError, few
from quant_core.naming import inside, matches
from quant_core.structure import ModelStructure, Modulation, SmoothingGroup

Selection = Literal["default", "all", "every"]


@dataclass(frozen=True)
class LinearGroup:
    """Name linears that get one factor, by the input they share, and what may absorb it.

    inputs: usually one tuple of names; two when the outputs of one attention feed two linears. modulation, values:
    full names of the linears that make the inputs, with the modulation's layout.
    """

    inputs: tuple[tuple[str, ...], ...]
    modulation: Modulation | None = None
    values: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Return all members."""
        return tuple(name for shared in self.inputs for name in shared)

    @property
    def name(self) -> str:
        """Return the first member's name, which stands for the group in messages."""
        return self.linears[0]


@dataclass(frozen=True)
class ResolvedGroups:
    """Hold the groups to smooth, and for each group that is left out (by its name) the reason."""

    smoothed: list[LinearGroup] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def resolve(
    model: nn.Module, structure: ModelStructure | None, *, targets: Collection[str], selection: Selection, fused: bool
) -> ResolvedGroups:
    """Return the groups of the model, block by block; one with a member that stays float is left out whole.

    targets: the linears that will be quantized. selection: the default groups are the model's usual ones, and its
    optional ones too where all usual ones stay float; `all` is both; `every` is also each linear that no group names,
    as a group of its own, and leaves no group out for a member that stays float. fused: groups with the same values
    become one. Raises ConfigurationError when nothing is left to smooth.
    """
    if structure is None:
        raise _no_structure(model)
    usual, optional = structure.smoothing_groups, structure.optional_smoothing_groups
    resolved = ResolvedGroups()
    for declared in (usual, usual + optional)[selection != "default" :]:
        found = list(_declared_on(model, declared))
        if selection == "every":
            found = _every(found, targets)
        resolved = _without_float_members(_joined_by_values(found) if fused else found, targets)
        if resolved.smoothed:
            return resolved
    raise _nothing_to_smooth(model, resolved.skipped)


def _without_float_members(groups: Iterable[LinearGroup], targets: Collection[str]) -> ResolvedGroups:
    resolved = ResolvedGroups()
    for group in groups:
        if float_members := [name for name in group.linears if name not in targets]:
            resolved.skipped[group.name] = f"{', '.join(float_members)} stays float"
        else:
            resolved.smoothed.append(group)
    return resolved


def _every(groups: Iterable[LinearGroup], targets: Collection[str]) -> list[LinearGroup]:
    """Return groups that hold every target: those of the model without their float members, and one for each other."""
    groups = list(groups)
    kept = [
        LinearGroup((members,), group.modulation, group.values)
        for group in groups
        for shared in group.inputs
        if (members := tuple(name for name in shared if name in targets))
    ]
    grouped = {name for group in kept for name in group.linears}
    return kept + [LinearGroup(((name,),)) for name in targets if name not in grouped]


def _declared_on(model: nn.Module, declared: Iterable[SmoothingGroup]) -> Iterator[LinearGroup]:
    modules, declared = dict(model.named_modules()), list(declared)
    for block in modules:
        for group in declared:
            names = _all_inside(block, group.linears)
            if matches(block, group.block) and all(isinstance(modules.get(name), nn.Linear) for name in names):
                yield LinearGroup((names,), _modulation_of(block, group), _all_inside(block, group.values))


def _all_inside(block: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(inside(block, name) for name in names)


def _modulation_of(block: str, group: SmoothingGroup) -> Modulation | None:
    if group.modulation is None:
        return None
    return Modulation(linear=inside(block, group.modulation.linear), chunks=group.modulation.chunks)


def _joined_by_values(groups: Iterable[LinearGroup]) -> list[LinearGroup]:
    """Make one group of those whose inputs are made from the same values: dividing a value divides it for all."""
    joined: dict[tuple[str, ...], LinearGroup] = {}
    for group in groups:
        key = group.values or group.linears
        inputs = joined[key].inputs + group.inputs if key in joined else group.inputs
        joined[key] = LinearGroup(inputs, group.modulation, group.values)
    return list(joined.values())


def _no_structure(model: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"nobody has said which linears of {type(model).__name__} share an input",
        where="outlier suppression",
        why="linears that share an input must share its factor, and names alone do not tell",
        advice="give quant_model a ModelStructure, register one as an entry point, or drop the outlier suppression",
    )


def _nothing_to_smooth(model: nn.Module, skipped: dict[str, str]) -> ConfigurationError:
    reasons = few(dict.fromkeys(skipped.values()))
    return ConfigurationError(
        f"no group of linears of {type(model).__name__} is left to smooth",
        where="outlier suppression",
        why=f"a group with a layer that stays float is left out whole: {reasons}"
        if skipped
        else "none of the groups of its structure exists in the model",
        advice="quantize these layers too (disable_names), or drop the outlier suppression (--anti_method)",
    )
