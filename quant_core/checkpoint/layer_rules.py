"""The rules inside one stored layer: what follows from what, and what the runtime's operators take.

`deq_scale` and `quant_bias` follow from the other tensors without a count of error (spec: how the consumer computes),
so they are computed anew and compared bit for bit. Each layer may follow either numerics: only a file of the reference
one may say which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.arithmetic.scales import QMAX, QMIN, pack_deq_scale, unpack_deq_scale
from quant_core.checkpoint.findings import Broken, Rule
from quant_core.checkpoint.inventory import StoredGroup
from quant_core.schemes import BY_TYPE

_INT32 = torch.iinfo(torch.int32)
# The longest axis that the runtime's products of codes take (spec: what the operators compute).
_LONGEST_AXIS = 65535


@dataclass(frozen=True)
class StoredLayer:
    """A layer's tensors, by their names in the rules; numerics: what the file says of itself, if anything."""

    group: StoredGroup
    tensors: Mapping[str, Tensor]
    numerics: str | None = None


def _deq_scale_follows(layer: StoredLayer) -> Iterator[Broken]:
    t = layer.tensors
    if "deq_scale" not in t:
        return

    def expected(numerics: Numerics) -> Tensor:
        exact = numerics.deq_scale(t["input_scale"].reshape(-1, 1), t["weight_scale"])
        return pack_deq_scale(exact, t["weight_scale"].dtype)

    yield from _follows(layer, "deq_scale", expected)


def _quant_bias_follows(layer: StoredLayer) -> Iterator[Broken]:
    if "quant_bias" in layer.tensors:
        yield from _follows(layer, "quant_bias", lambda numerics: _quant_bias(layer, numerics))


def _quant_bias(layer: StoredLayer, numerics: Numerics) -> Tensor:
    t = layer.tensors
    deq_scale_TO = unpack_deq_scale(t["deq_scale"]).reshape(-1, len(t["weight"]))
    return numerics.quant_bias(t.get("bias"), deq_scale_TO, t["weight"], t["input_offset"].reshape(-1, 1))


def _follows(layer: StoredLayer, name: str, expected: Callable[[Numerics], Tensor]) -> Iterator[Broken]:
    """Object to a tensor that neither numerics computes so, at its first place that differs."""
    stored, wrong = layer.tensors[name].flatten(), []
    for numerics in NUMERICS.values():
        wrong.append(stored != expected(numerics).flatten())
        if not wrong[-1].any():
            return
    place, count = int(wrong[0].nonzero()[0]), int(wrong[0].sum())
    full, value = layer.group.members[name], stored[place].item()
    yield Broken(full, f"'{full}' holds {value}, which does not follow ({count} of {stored.numel()} so)")


def _quant_bias_has_room(layer: StoredLayer) -> Iterator[Broken]:
    """Object to a bias at an end of int32, or with which the sum of some input's codes would leave it.

    Where the file says that it equals the reference tool's, such a bias is what that tool stores.
    """
    if "quant_bias" not in layer.tensors:
        return
    reference = NUMERICS["reference"]
    if layer.numerics == reference.name:
        stored = layer.tensors["quant_bias"].flatten()
        if torch.equal(stored, _quant_bias(layer, reference).flatten()):
            return
    full, w_OI = layer.group.members["quant_bias"], layer.tensors["weight"]
    bias_TO = layer.tensors["quant_bias"].reshape(-1, len(w_OI)).to(torch.int64)
    above_O, below_O = (part.sum(1, dtype=torch.int64) for part in (w_OI.clamp(min=0), w_OI.clamp(max=0)))
    most_O, least_O = QMAX * above_O + QMIN * below_O, QMIN * above_O + QMAX * below_O
    for name, found in (
        ("saturated", (bias_TO <= _INT32.min) | (bias_TO >= _INT32.max)),
        ("too large", (bias_TO + most_O > _INT32.max) | (bias_TO + least_O < _INT32.min)),
    ):
        if bool(found.any()):
            yield Broken(full, f"'{full}' is {name} in {int(found.sum())} of {found.numel()} places")
            return


def _operators_take_it(layer: StoredLayer) -> Iterator[Broken]:
    full, shape = layer.group.members["weight"], tuple(layer.tensors["weight"].shape)
    if max(shape) > _LONGEST_AXIS:
        yield Broken(full, f"'{full}' is {shape}: an axis is longer than {_LONGEST_AXIS}")
    if shape[0] < BY_TYPE[layer.group.type].least_outputs:
        yield Broken(full, f"'{full}' has one output")


LAYER_RULES: tuple[Rule[StoredLayer], ...] = (
    Rule("deq_scale", "it is input_scale times weight_scale, to the last bit", _deq_scale_follows),
    Rule(
        "quant_bias",
        "it is round(bias / deq_scale - input_offset * row sum of the codes), to the last bit",
        _quant_bias_follows,
    ),
    Rule("room for the bias", "the integer product and its bias are added in 32 bits", _quant_bias_has_room),
    Rule("operators", "the runtime loads such a layer and fails when it computes", _operators_take_it),
)
