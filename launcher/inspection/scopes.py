"""Count a model's linear layers that are alike, so that a person sees a few lines instead of hundreds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from model_adapters.weights.transformer_part import TransformerPart
from quant_core.naming import linear_names, matches


@dataclass(frozen=True)
class Scope:
    """Linear layers of one name but for the number of the block: what becomes of them, and why they stay float.

    style, local: how a rank holds them, (outputs, inputs).
    """

    pattern: str
    count: int
    scheme: str
    reason: str
    style: str
    local: tuple[int, int]


def scopes_of(
    model: nn.Module, types: Mapping[str, str], rules: Mapping[str, str], part: TransformerPart | None
) -> list[Scope]:
    """Count layers that are alike; types: of those to quantize; rules: what keeps others float, by its pattern."""
    found: dict[tuple[str, str, str, str, tuple[int, int]], int] = {}
    for name in linear_names(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "linear_names lists no other"
        rule = next((rule for pattern, rule in rules.items() if matches(name, pattern)), None)
        reason = "" if name in types else rule or "the model's output"
        style = part.shards[name].style.value if part and name in part.shards else "replicated"
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        key = pattern, types.get(name, "float"), reason, style, (linear.out_features, linear.in_features)
        found[key] = found.get(key, 0) + 1
    return [
        Scope(pattern, count, scheme, reason, style, local)
        for (pattern, scheme, reason, style, local), count in found.items()
    ]
