"""The rules that a checkpoint's tensors obey, as a table: dtype, shape, allowed values, and type in the description.

The consumer checks little of this: it skips unknown types without a word, rounds, casts, and computes. So the rules
are stricter than the loader (spec: checkpoint that the runtime loads).

Axes: O out features, I in features, T timesteps, H heads (each one size within a layer; T one in the whole
checkpoint), and 1 for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.arithmetic.scales import QMAX, QMIN, unpack_deq_scale

# The dtype of the model -> that of the tensor.
DtypeRule = Callable[[torch.dtype], torch.dtype]

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ValueRule(NamedTuple):
    """Say which values a tensor may hold: in words, and as a test of each element."""

    says: str
    holds: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorRule:
    """Say what one tensor of a quantized layer is.

    is_float: the description calls it FLOAT instead of the layer's type. required: whether a layer must have it.
    """

    dtype: DtypeRule
    axes: str
    values: ValueRule
    is_float: bool = False
    required: bool = True


def _of_model(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _int8(dtype: torch.dtype) -> torch.dtype:
    return torch.int8


def _int32(dtype: torch.dtype) -> torch.dtype:
    return torch.int32


def _packed(dtype: torch.dtype) -> torch.dtype:
    """Return the form of `deq_scale` that the runtime reads for a model of this dtype."""
    return torch.float32 if dtype == torch.bfloat16 else torch.int64


def _positive(t: Tensor) -> Tensor:
    return t.isfinite() & (t > 0)


def _packed_positive(t: Tensor) -> Tensor:
    # The consumer reads the low half only; anything in the high half is somebody else's data.
    fits = (t >> 32 == 0) if t.dtype == torch.int64 else torch.ones_like(t, dtype=torch.bool)
    return fits & _positive(unpack_deq_scale(t))


CODES = ValueRule("codes from -127 to 127", lambda t: t != QMIN)
FINITE = ValueRule("finite numbers", lambda t: t.isfinite())
INTEGER = ValueRule("integers", lambda t: torch.ones_like(t, dtype=torch.bool))
POSITIVE = ValueRule("finite numbers above 0", _positive)
PACKED_POSITIVE = ValueRule("float32 numbers, finite and above 0", _packed_positive)
ZERO = ValueRule("zeros", lambda t: t == 0)
OFFSET = ValueRule("whole numbers from -128 to 127", lambda t: (t == t.round()) & (t >= QMIN) & (t <= QMAX))

_WEIGHT = {
    "weight": TensorRule(_int8, "OI", CODES),
    "bias": TensorRule(_of_model, "O", FINITE, is_float=True, required=False),
    "weight_scale": TensorRule(_of_model, "O1", POSITIVE),
    "weight_offset": TensorRule(_of_model, "O1", ZERO),
}
_STATIC = {
    "input_scale": TensorRule(_of_model, "1", POSITIVE),
    "input_offset": TensorRule(_of_model, "1", OFFSET),
    "quant_bias": TensorRule(_int32, "O", INTEGER),
    "deq_scale": TensorRule(_packed, "O", PACKED_POSITIVE),
}
_PER_STEP = {name: replace(rule, axes=f"T{rule.axes}") for name, rule in _STATIC.items()}

# The type of the description -> the rule of each tensor of a layer.
LAYER_RULES: Mapping[str, Mapping[str, TensorRule]] = {
    "W8A8": _WEIGHT | _STATIC,
    "W8A8_TIMESTEP": _WEIGHT | _PER_STEP,
    "W8A8_DYNAMIC": _WEIGHT,
}
# The one more tensor of a smoothed layer.
SMOOTHING_RULES: Mapping[str, TensorRule] = {"mul_scale": TensorRule(_of_model, "I", POSITIVE, is_float=True)}
# The tensors of an attention, relative to its name.
ATTENTION_RULES: Mapping[str, TensorRule] = {
    f"fa_{part}.{name}": rule
    for name, rule in {
        "scale": TensorRule(_of_model, "H1", POSITIVE),
        "offset": TensorRule(_int8, "H1", ZERO),
    }.items()
    for part in "qkv"
}


def bind_axes(axes: str, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Tell whether a shape has these axes, adding the size of each new axis to `sizes`; "OI" and (4, 3): O=4, I=3."""
    if len(axes) != len(shape):
        return False
    return all(size == (1 if axis == "1" else sizes.setdefault(axis, size)) for axis, size in zip(axes, shape))


def in_words(axes: str, sizes: Mapping[str, int]) -> str:
    """Return axes as a reader expects a shape, known sizes filled in: "OI" with O=4 is "(4, I)"."""
    parts = [str(sizes.get(axis, axis)) for axis in axes]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
