"""The rules of what a checkpoint holds besides the tensors of its schemes, and how axes are compared with shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quant_core.schemes.tensor_rules import POSITIVE, ZERO, TensorRule, TensorRules

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The one more tensor of a smoothed layer.
SMOOTHING_RULES: TensorRules = {"mul_scale": TensorRule("model", "I", POSITIVE, is_float=True)}
# The tensors of an attention, relative to its name.
ATTENTION_RULES: TensorRules = {
    f"fa_{part}.{name}": rule
    for name, rule in {
        "scale": TensorRule("model", "H1", POSITIVE),
        "offset": TensorRule("int8", "H1", ZERO),
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
