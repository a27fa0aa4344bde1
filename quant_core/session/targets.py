"""Which linear layers of a model a session quantizes, and by which scheme each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from quant_core.errors import ConfigurationError, few
from quant_core.naming import linear_names, select
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
    others get the session's one scheme. Raises ConfigurationError for a pattern that matches no layer, or only layers
    that patterns in front of it decide, and for a scheme for the last layer only.
    """
    names, rules, where = _linear_names(model), config.layer_schemes, f"layer_schemes, model {type(model).__name__}"
    decided_by: dict[str, str] = {}
    for pattern, scheme in rules.items():
        matched = select(names, [pattern], where=where)
        if matched == names[-1:] and isinstance(scheme, SchemeConfig):
            raise _stays_float(names[-1], pattern, where)
        found = [name for name in matched if name != names[-1]]
        if found and all(name in decided_by for name in found):
            raise _decides_nothing(pattern, list(dict.fromkeys(decided_by[name] for name in found)), where)
        decided_by |= {name: pattern for name in found if name not in decided_by}
    others = dict.fromkeys(target_layers(model, config.scheme.disable_names), config.scheme)
    plan: dict[str, SchemeConfig] = {}
    for name in names[:-1]:
        chosen = rules[decided_by[name]] if name in decided_by else others.get(name)
        if isinstance(chosen, SchemeConfig):
            plan[name] = chosen
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


def _decides_nothing(pattern: str, earlier: Sequence[str], where: str) -> ConfigurationError:
    those = few([f"'{each}'" for each in earlier], between=", ")
    return ConfigurationError(
        f"'{pattern}' decides for no layer",
        where=where,
        why=f"the first match wins, and {those} in front of it match all its layers",
        advice=f"put the narrower one first, '{pattern}' in front of '{earlier[0]}', or drop it",
    )


def _stays_float(last: str, pattern: str, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"'{pattern}' gives a scheme to '{last}' only, which stays float",
        where=where,
        why="the last linear makes the model's output, and is never quantized",
        advice=f"drop the pattern, or say {pattern}=float",
    )
