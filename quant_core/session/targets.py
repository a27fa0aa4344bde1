"""Which linear layers of a model a session quantizes, and by which scheme each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from quant_core.errors import ConfigurationError
from quant_core.naming import linear_names, matches, select
from quant_core.schemes.scheme import SchemeConfig

if TYPE_CHECKING:
    from quant_core.session.config import SessionConfig


def target_layers(model: nn.Module, disable_names: Sequence[str]) -> list[str]:
    """Return the linear layers to quantize, in model order: all but the disabled ones and the last.

    The last linear makes the model's output; it stays float whatever is asked (spec: which layers).
    Raises ConfigurationError for a pattern that matches no layer.
    """
    names = _linear_names(model)
    kept_float = set(select(names, disable_names, where=f"disable_names, model {type(model).__name__}"))
    kept_float.add(names[-1])
    return [name for name in names if name not in kept_float]


def layer_plan(model: nn.Module, config: SessionConfig) -> dict[str, SchemeConfig]:
    """Return the scheme of each linear layer to quantize, in model order.

    The first pattern of `layer_schemes` that matches a layer decides; then `disable_names` keep layers float; all
    others get the session's one scheme. Raises ConfigurationError for a pattern that matches no layer, or a scheme for
    the last one only.
    """
    names, rules, where = _linear_names(model), config.layer_schemes, f"layer_schemes, model {type(model).__name__}"
    for pattern, scheme in rules.items():
        if select(names, [pattern], where=where) == names[-1:] and isinstance(scheme, SchemeConfig):
            raise _stays_float(names[-1], pattern, where)
    others = dict.fromkeys(target_layers(model, config.scheme.disable_names), config.scheme)
    plan: dict[str, SchemeConfig] = {}
    for name in names[:-1]:
        found = next((scheme for pattern, scheme in rules.items() if matches(name, pattern)), others.get(name))
        if isinstance(found, SchemeConfig):
            plan[name] = found
    if not plan:
        raise _nothing_left(model, names)
    return plan


def _linear_names(model: nn.Module) -> list[str]:
    names = linear_names(model)
    if not names:
        raise ConfigurationError(
            f"{type(model).__name__} has no linear layer",
            where="the model",
            why="linear layers are what is quantized",
            advice="give the transformer of a pipeline, not the pipeline or another part",
        )
    return names


def _nothing_left(model: nn.Module, names: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"no layer of {type(model).__name__} is left to quantize",
        where="disable_names, layer_schemes",
        why=f"of its {len(names)} linear layers '{names[-1]}' always stays float, and all others are disabled",
        advice="keep fewer layers float",
    )


def _stays_float(last: str, pattern: str, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"'{pattern}' gives a scheme to '{last}' only, which stays float",
        where=where,
        why="the last linear makes the model's output, and is never quantized",
        advice=f"drop the pattern, or say {pattern}=float",
    )
