"""Which linear layers of a model a session quantizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from quant_core.naming import linear_names, select


def target_layers(model: nn.Module, disable_names: Sequence[str]) -> list[str]:
    """Return the linear layers to quantize, in model order: all but the disabled ones and the last.

    The last linear makes the model's output; it stays float whatever is asked (spec: which layers).
    Raises ConfigurationError for a pattern that matches no layer.
    """
    names = linear_names(model)
    kept_float = set(select(names, disable_names, where=f"disable_names, model {type(model).__name__}"))
    kept_float.add(names[-1])
    return [name for name in names if name not in kept_float]
