"""The rules that a checkpoint's tensors obey: dtype, axes, allowed values, and type in the description.

The consumer checks little of this: it skips unknown types without a word, rounds, casts, and computes. So the rules
are stricter than the loader (spec: checkpoint that the runtime loads).

Axes: O out features, I in features, T timesteps, H heads (each one size within a layer; T one in the whole
checkpoint), and 1 for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ValueRule(NamedTuple):
    """Say which values a tensor may hold: in words, and as a test of each element.

    whole: the same test of all elements at once, many times as fast, for tensors that are large.
    """

    says: str
    holds: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], bool] | None = None

    def all_hold(self, tensor: Tensor) -> bool:
        """Tell whether every element may stand there."""
        if self.whole is not None and tensor.numel():
            return self.whole(tensor)
        return bool(self.holds(tensor).all())


@dataclass(frozen=True)
class TensorRule:
    """Say what one tensor of a quantized layer is.

    dtype: `model` for the model's own, `packed` for the form in which the runtime reads `deq_scale`. is_float: the
    description calls it FLOAT instead of the layer's type. required: whether a layer must have it.
    """

    dtype: Literal["model", "packed", "int8", "int32"]
    axes: str
    values: ValueRule
    is_float: bool = False
    required: bool = True

    def dtype_in(self, model: torch.dtype) -> torch.dtype:
        """Return the tensor's dtype in a model of that dtype."""
        import torch

        from quant_core.arithmetic.scales import packed_dtype

        return {"model": model, "packed": packed_dtype(model), "int8": torch.int8, "int32": torch.int32}[self.dtype]


TensorRules = Mapping[str, TensorRule]


def _all_finite(t: Tensor) -> bool:
    from quant_core.arithmetic.blocks import magnitudes, row_blocks

    if not t.is_floating_point():
        return True
    matrix = t.reshape(-1, t.shape[-1] if t.ndim else 1)
    return all(bool(magnitudes(matrix[rows]).isfinite().all()) for rows in row_blocks(matrix))


def _packed_positive(t: Tensor) -> Tensor:
    from quant_core.arithmetic.scales import unpack_deq_scale

    unpacked = unpack_deq_scale(t)
    # The consumer reads the low half only; anything in the high half is somebody else's data.
    fits = (t >> 32 == 0) if not t.is_floating_point() else unpacked == unpacked
    return fits & unpacked.isfinite() & (unpacked > 0)


CODES = ValueRule("codes from -127 to 127", lambda t: t >= -127, lambda t: bool(t.amin() >= -127))
FINITE = ValueRule("finite numbers", lambda t: t.isfinite(), _all_finite)
INTEGER = ValueRule("integers", lambda t: t == t)
POSITIVE = ValueRule("finite numbers above 0", lambda t: t.isfinite() & (t > 0))
PACKED_POSITIVE = ValueRule("float32 numbers, finite and above 0", _packed_positive)
ZERO = ValueRule("zeros", lambda t: t == 0)
OFFSET = ValueRule("whole numbers from -128 to 127", lambda t: (t == t.round()) & (t >= -128) & (t <= 127))

WEIGHT_RULES: TensorRules = {
    "weight": TensorRule("int8", "OI", CODES),
    "bias": TensorRule("model", "O", FINITE, is_float=True, required=False),
    "weight_scale": TensorRule("model", "O1", POSITIVE),
    "weight_offset": TensorRule("model", "O1", ZERO),
}
STATIC_RULES: TensorRules = {
    "input_scale": TensorRule("model", "1", POSITIVE),
    "input_offset": TensorRule("model", "1", OFFSET),
    "quant_bias": TensorRule("int32", "O", INTEGER),
    "deq_scale": TensorRule("packed", "O", PACKED_POSITIVE),
}


def per_step(rules: TensorRules) -> TensorRules:
    """Return the rules of tensors that have a row for each timestep."""
    return {name: replace(rule, axes=f"T{rule.axes}") for name, rule in rules.items()}
