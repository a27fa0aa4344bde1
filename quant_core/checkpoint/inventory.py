"""What a checkpoint holds, from its description and its headers alone: layers, attentions, float tensors.

Taking the inventory checks everything that can be checked without reading a tensor: description and tensors one to
one, known types, every layer complete, dtypes and shapes by the rules of `contract`, one model dtype, one number of
timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant_core.checkpoint.contract import (
    ATTENTION_RULES,
    MODEL_DTYPES,
    SMOOTHING_RULES,
    bind_axes,
    in_words,
)
from quant_core.checkpoint.entries import FA_QUANT, FA_QUANT_TYPE_KEY, FLOAT, MODEL_TYPE_KEY
from quant_core.checkpoint.tensor_parts import TensorInfo
from quant_core.errors import VerificationError, suggestion
from quant_core.schemes import BY_TYPE
from quant_core.schemes.tensor_rules import TensorRules

_MUL_SCALE = ".div.mul_scale"
_INNER = ".linear"


@dataclass(frozen=True)
class StoredGroup:
    """Name the tensors that belong together: those of one linear layer, or the scales of one attention.

    name: the module in the float model; type: in the description; members: name by rule name.
    """

    name: str
    type: str
    members: Mapping[str, str]
    rules: TensorRules


@dataclass(frozen=True)
class Inventory:
    """List what a checkpoint holds; `floats` are the tensors of layers that are not quantized, in order.

    quant_type: what the checkpoint is called after; each layer has a type of its own.
    """

    quant_type: str
    dtype: torch.dtype
    timesteps: int | None
    layers: Mapping[str, StoredGroup]
    attentions: Mapping[str, StoredGroup]
    floats: tuple[str, ...]


def take_inventory(description: Mapping[str, Any], infos: Mapping[str, TensorInfo], where: Path) -> Inventory:
    """Return what is there. Raises VerificationError naming the file and the tensor that breaks a rule."""
    quant_type = _quant_type(description, where)
    types = {name: kind for name, kind in description.items() if name not in (MODEL_TYPE_KEY, FA_QUANT_TYPE_KEY)}
    _check_one_to_one(types, infos, where)
    _check_types(types, description.get(FA_QUANT_TYPE_KEY), where)
    layers = _by_name(_layers(types), where)
    attentions = _by_name(_attentions(types), where)
    groups = [*layers.values(), *attentions.values()]
    for group in groups:
        _check_complete(group, types, where)
    dtype = _model_dtype(layers, infos, where)
    timesteps = _check_headers(groups, infos, dtype, where)
    grouped = {member for group in groups for member in group.members.values()}
    floats = tuple(name for name in types if name not in grouped)
    _check_left_over(floats, types, where)
    return Inventory(quant_type, dtype, timesteps, layers, attentions, floats)


def broken(what: str, where: Path | str, why: str = "") -> VerificationError:
    """Return the error that says that a file breaks a rule."""
    return VerificationError(what, where=str(where), why=why, advice="quantize again, or copy the files again")


def _quant_type(description: Mapping[str, Any], where: Path) -> str:
    found = description.get(MODEL_TYPE_KEY)
    if isinstance(found, str) and found in BY_TYPE:
        return found
    raise broken(f"{MODEL_TYPE_KEY} is {found!r}", where, f"it has to be {suggestion(str(found), BY_TYPE)}")


def _check_one_to_one(types: Mapping[str, Any], infos: Mapping[str, TensorInfo], where: Path) -> None:
    for name in types:
        if name not in infos:
            raise broken(
                f"the tensor '{name}' is missing", where, "the description lists it, the weights do not hold it"
            )
    for name in infos:
        if name not in types:
            raise broken(f"the tensor '{name}' is not described", where, "the weights hold it; the consumer skips it")


def _check_types(types: Mapping[str, Any], fa_type: Any, where: Path) -> None:
    known = (FLOAT, *BY_TYPE, FA_QUANT)
    for name, kind in types.items():
        if kind not in known:
            raise broken(
                f"'{name}' has the unknown type {kind!r}",
                where,
                f"the consumer would skip it without a word; types here are {', '.join(known)}",
            )
    expected = FA_QUANT if FA_QUANT in types.values() else None
    if fa_type != expected:
        raise broken(f"{FA_QUANT_TYPE_KEY} is {fa_type!r}", where, f"by the entries it has to be {expected!r}")


def _layers(types: Mapping[str, str]) -> Iterator[StoredGroup]:
    """Yield the linear layers in order: whatever carries a quantized type, with its bias and smoothing factor."""
    # The first tensor of a layer, its weight, says its type; `_check_complete` compares the others with it.
    prefixes: dict[str, str] = {}
    for name, kind in types.items():
        if kind in BY_TYPE:
            prefixes.setdefault(name.rpartition(".")[0], kind)
    for prefix, quant_type in prefixes.items():
        scheme = BY_TYPE[quant_type]
        rules = scheme.rules
        members = {rule: f"{prefix}.{rule}" for rule in rules if f"{prefix}.{rule}" in types}
        name = prefix.removesuffix(_INNER)
        if name != prefix and f"{name}{_MUL_SCALE}" in types and scheme.multiplies_input:
            smoothed = members | {"mul_scale": f"{name}{_MUL_SCALE}"}
            yield StoredGroup(name, quant_type, smoothed, {**rules, **SMOOTHING_RULES})
        else:
            yield StoredGroup(prefix, quant_type, members, rules)


def _attentions(types: Mapping[str, str]) -> Iterator[StoredGroup]:
    prefixes = dict.fromkeys(name.rpartition(".fa_")[0] for name, kind in types.items() if kind == FA_QUANT)
    for prefix in prefixes:
        members = {rule: f"{prefix}.{rule}" for rule in ATTENTION_RULES if f"{prefix}.{rule}" in types}
        yield StoredGroup(prefix, FA_QUANT, members, ATTENTION_RULES)


def _by_name(groups: Iterable[StoredGroup], where: Path) -> dict[str, StoredGroup]:
    found: dict[str, StoredGroup] = {}
    for group in groups:
        if group.name in found:
            raise broken(f"the layer '{group.name}' is there twice", where, "once smoothed and once not")
        found[group.name] = group
    return found


def _check_complete(group: StoredGroup, types: Mapping[str, str], where: Path) -> None:
    for rule_name, rule in group.rules.items():
        member = group.members.get(rule_name)
        if member is None and rule.required:
            raise broken(f"'{group.name}' has no {rule_name}", where, f"{group.type} needs it")
        expected = FLOAT if rule.is_float else group.type
        if member is not None and types[member] != expected:
            raise broken(f"'{member}' has the type {types[member]}", where, f"it has to be {expected}")


def _model_dtype(layers: Mapping[str, StoredGroup], infos: Mapping[str, TensorInfo], where: Path) -> torch.dtype:
    """Return the model's dtype, which is that of the first layer's scales: all others must agree with it."""
    if not layers:
        raise broken("no layer is quantized", where, "a checkpoint without a quantized layer is not one")
    name = next(iter(layers.values())).members["weight_scale"]
    if infos[name].dtype not in MODEL_DTYPES:
        raise broken(
            f"'{name}' is {infos[name].dtype}", where, "scales have the model's dtype, a float of 16 or 32 bits"
        )
    return infos[name].dtype


def _check_headers(
    groups: Iterable[StoredGroup], infos: Mapping[str, TensorInfo], dtype: torch.dtype, where: Path
) -> int | None:
    """Check every grouped tensor's dtype and shape, and return the one number of timesteps, if any."""
    shared: dict[str, int] = {}
    for group in groups:
        sizes = dict(shared)
        for rule_name, member in group.members.items():
            rule, info = group.rules[rule_name], infos[member]
            if info.dtype != rule.dtype_in(dtype):
                raise broken(
                    f"'{member}' is {info.dtype}", where, f"it has to be {rule.dtype_in(dtype)} in a model of {dtype}"
                )
            if not bind_axes(rule.axes, info.shape, sizes) or 0 in info.shape:
                raise broken(f"'{member}' has the shape {info.shape}", where, f"not {in_words(rule.axes, sizes)}")
        shared |= {axis: size for axis, size in sizes.items() if axis == "T"}
    return shared.get("T")


def _check_left_over(floats: Iterable[str], types: Mapping[str, str], where: Path) -> None:
    for name in floats:
        if types[name] != FLOAT:
            raise broken(f"'{name}' is typed {types[name]}", where, "no quantized layer has a tensor of that name")
        if name.endswith(_MUL_SCALE):
            raise broken(
                f"'{name}' belongs to no layer",
                where,
                "no layer whose input the runtime multiplies is beside it",
            )
