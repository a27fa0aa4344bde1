"""What a checkpoint holds, from its description and its headers alone: layers, attentions, float tensors.

Taking the inventory checks everything that can be checked without reading a tensor: description and tensors one to
one, known types, every layer complete, dtypes and shapes by the rules of `contract`, one model dtype, one number of
timesteps. It lists all that is wrong; what is listed as sound can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quant_core.checkpoint.contract import (
    ATTENTION_RULES,
    MODEL_DTYPES,
    SMOOTHING_RULES,
    bind_axes,
    in_words,
)
from quant_core.checkpoint.entries import FA_QUANT, FA_QUANT_TYPE_KEY, FLOAT, MODEL_TYPE_KEY, CheckpointFiles
from quant_core.checkpoint.findings import Finding
from quant_core.checkpoint.tensor_parts import TensorInfo
from quant_core.errors import suggestion
from quant_core.schemes import BY_TYPE
from quant_core.schemes.tensor_rules import TensorRules

_MUL_SCALE = ".div.mul_scale"
_INNER = ".linear"
_KEYS = (MODEL_TYPE_KEY, FA_QUANT_TYPE_KEY)


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


def take_inventory(
    description: Mapping[str, Any], infos: Mapping[str, TensorInfo], files: CheckpointFiles
) -> tuple[Inventory | None, list[Finding]]:
    """Return what is there and sound, and all that breaks a rule; no inventory if nothing at all can be made of it."""
    survey = _Survey(description, infos, files)
    return survey.inventory(), survey.findings


@dataclass
class _Survey:
    """Look at one checkpoint, keeping what is found."""

    description: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    files: CheckpointFiles
    findings: list[Finding] = field(default_factory=list)

    def described(self, rule: str, tensor: str, what: str, why: str) -> None:
        """Note what is wrong in the description."""
        self.findings.append(Finding(rule, self.files.description, tensor, what, why))

    def stored(self, rule: str, tensor: str, what: str, why: str) -> None:
        """Note what is wrong in the headers of the tensors."""
        self.findings.append(Finding(rule, self.files.weights, tensor, what, why))

    def inventory(self) -> Inventory | None:
        """Return what is there and sound, noting all that is wrong; None if nothing can be made of it."""
        quant_type = self.description.get(MODEL_TYPE_KEY)
        if not isinstance(quant_type, str) or quant_type not in BY_TYPE:
            wanted = suggestion(str(quant_type), BY_TYPE)
            self.described("model type", "", f"{MODEL_TYPE_KEY} is {quant_type!r}", f"it has to be {wanted}")
            return None
        types = {name: kind for name, kind in self.description.items() if name not in _KEYS}
        self._check_one_to_one(types)
        known = self._known(types)
        layers, attentions = self._by_name(_layers(known)), self._by_name(_attentions(known))
        groups = [*layers.values(), *attentions.values()]
        for group in groups:
            self._check_complete(group, known)
        dtype = self._model_dtype(layers)
        if dtype is None:
            return None
        timesteps = self._check_headers(groups, dtype)
        grouped = {member for group in groups for member in group.members.values()}
        floats = tuple(name for name in known if name not in grouped and name in self.infos)
        self._check_left_over(floats, known)
        self._check_order(layers)
        return Inventory(quant_type, dtype, timesteps, self._sound(layers), self._sound(attentions), floats)

    def _sound(self, groups: Mapping[str, StoredGroup]) -> dict[str, StoredGroup]:
        """Return the groups that nothing was found in."""
        named = {finding.tensor for finding in self.findings}
        return {name: group for name, group in groups.items() if not named & {name, *group.members.values()}}

    def _check_one_to_one(self, types: Mapping[str, Any]) -> None:
        for name in [name for name in types if name not in self.infos]:
            why = "the description lists it, the weights do not hold it"
            self.described("one to one", name, f"the tensor '{name}' is missing", why)
        for name in [name for name in self.infos if name not in types]:
            why = "the weights hold it; the consumer skips it"
            self.described("one to one", name, f"the tensor '{name}' is not described", why)

    def _known(self, types: Mapping[str, Any]) -> dict[str, str]:
        """Return the entries whose type is known."""
        known = (FLOAT, *BY_TYPE, FA_QUANT)
        for name in [name for name, kind in types.items() if kind not in known]:
            why = f"the consumer would skip it without a word; types here are {', '.join(known)}"
            self.described("known types", name, f"'{name}' has the unknown type {types[name]!r}", why)
        found, expected = self.description.get(FA_QUANT_TYPE_KEY), FA_QUANT if FA_QUANT in types.values() else None
        if found != expected:
            why = f"by the entries it has to be {expected!r}"
            self.described("attention type", "", f"{FA_QUANT_TYPE_KEY} is {found!r}", why)
        return {name: kind for name, kind in types.items() if kind in known}

    def _by_name(self, groups: Iterable[StoredGroup]) -> dict[str, StoredGroup]:
        found: dict[str, StoredGroup] = {}
        for group in groups:
            if group.name in found:
                why = "once smoothed and once not"
                self.described("each layer once", group.name, f"the layer '{group.name}' is there twice", why)
            found[group.name] = group
        return found

    def _check_complete(self, group: StoredGroup, types: Mapping[str, str]) -> None:
        for rule_name, rule in group.rules.items():
            member = group.members.get(rule_name)
            if member is None and rule.required:
                what = f"'{group.name}' has no {rule_name}"
                self.described("complete layers", group.name, what, f"{group.type} needs it")
            expected = FLOAT if rule.is_float else group.type
            if member is not None and types[member] != expected:
                what = f"'{member}' has the type {types[member]}"
                self.described("types of a layer", member, what, f"it has to be {expected}")

    def _model_dtype(self, layers: Mapping[str, StoredGroup]) -> torch.dtype | None:
        """Return the model's dtype, which is that of the first layer's scales: all others must agree with it."""
        if not layers:
            why = "a checkpoint without a quantized layer is not one"
            self.described("quantized layers", "", "no layer is quantized", why)
            return None
        scales = [group.members["weight_scale"] for group in layers.values() if "weight_scale" in group.members]
        name = next((name for name in scales if name in self.infos), None)
        if name is None:
            return None
        if self.infos[name].dtype not in MODEL_DTYPES:
            why = "scales have the model's dtype, a float of 16 or 32 bits"
            self.stored("dtypes", name, f"'{name}' is {self.infos[name].dtype}", why)
            return None
        return self.infos[name].dtype

    def _check_headers(self, groups: Iterable[StoredGroup], dtype: torch.dtype) -> int | None:
        """Check every grouped tensor's dtype and shape, and return the one number of timesteps, if any."""
        shared: dict[str, int] = {}
        for group in groups:
            sizes = dict(shared)
            for rule_name, member in group.members.items():
                if member not in self.infos:
                    continue
                rule, info = group.rules[rule_name], self.infos[member]
                if info.dtype != rule.dtype_in(dtype):
                    why = f"it has to be {rule.dtype_in(dtype)} in a model of {dtype}"
                    self.stored("dtypes", member, f"'{member}' is {info.dtype}", why)
                if not bind_axes(rule.axes, info.shape, sizes) or 0 in info.shape:
                    why = f"not {in_words(rule.axes, sizes)}"
                    self.stored("shapes", member, f"'{member}' has the shape {info.shape}", why)
            shared |= {axis: size for axis, size in sizes.items() if axis == "T"}
        return shared.get("T")

    def _check_left_over(self, floats: Iterable[str], types: Mapping[str, str]) -> None:
        for name in floats:
            if types[name] != FLOAT:
                why = "no quantized layer has a tensor of that name"
                self.described("types of a layer", name, f"'{name}' is typed {types[name]}", why)
            if name.endswith(_MUL_SCALE):
                why = "no layer whose input the runtime multiplies is beside it"
                self.described("smoothing factors", name, f"'{name}' belongs to no layer", why)

    def _check_order(self, layers: Mapping[str, StoredGroup]) -> None:
        """Check that the description begins with the model's type and lists a layer's tensors in their order."""
        if next(iter(self.description)) != MODEL_TYPE_KEY:
            why = "the model's type comes first, then an entry for each tensor"
            self.described("order", "", f"{MODEL_TYPE_KEY} does not stand first", why)
        places = {name: place for place, name in enumerate(self.description)}
        for group in layers.values():
            own = [places[group.members[name]] for name in group.rules if name in group.members and name != "mul_scale"]
            if own != sorted(own):
                why = f"in the order {', '.join(group.members)}"
                self.described("order", group.name, f"the tensors of '{group.name}' are listed in another order", why)


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
