"""The one grammar of layer names: shell patterns on full module names.

`*` matches any run of characters, dots included, `?` one character, `[ab]` one of a set; case counts. So
`*net.2*` means the second feed-forward linear of every block, and `context_embedder` only the layer of that
very name. Recipes, `disable_names`, shard plans and smoothing groups all speak it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from quant_core.errors import ConfigurationError, suggestion

Patterns = str | Iterable[str]

_WILDCARDS = "*?["


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return the patterns as a tuple: a single string is one pattern, never its characters."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def is_name(pattern: str) -> bool:
    """Tell whether a pattern matches the layer of its very name only."""
    return not any(wildcard in pattern for wildcard in _WILDCARDS)


def inside(block: str, name: str) -> str:
    """Return the full name of what a block calls by that name; an empty block is the model itself."""
    return f"{block}.{name}" if block else name


def matches(name: str, patterns: Patterns) -> bool:
    """Tell whether the full module name matches at least one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in as_patterns(patterns))


def select(names: Iterable[str], patterns: Patterns, *, where: str, what: str = "layer") -> list[str]:
    """Return the names that match some pattern, each once, in the order of `names` (the model's order).

    `where` says for the reader where the patterns came from, `what` what a name stands for.
    Raises ConfigurationError for a pattern that matches nothing.
    """
    ordered, wanted = list(names), as_patterns(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in ordered):
            raise _nothing_matches(pattern, ordered, where, what)
    return [name for name in ordered if matches(name, wanted)]


def linear_names(model: nn.Module) -> list[str]:
    """Return the full names of all linear layers in `named_modules()` order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of that full name, which is known to be one."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
    return linear


def get_disable_layer_names(model: nn.Module, layer_include: Patterns, layer_exclude: Patterns) -> list[str]:
    """Return the names of the linear layers to keep float.

    A layer is quantized when it matches an include pattern and no exclude pattern; all others are returned, in the
    model's order. With `"*"` and `"*net.2*"` these are the second feed-forward linears.
    Raises ConfigurationError for a pattern that matches no linear layer (spec: which layers).
    """
    names, model_name = linear_names(model), type(model).__name__
    included = set(select(names, layer_include, where=f"layer_include, model {model_name}"))
    excluded = set(select(names, layer_exclude, where=f"layer_exclude, model {model_name}"))
    return [name for name in names if name not in included or name in excluded]


def _nothing_matches(pattern: str, names: Sequence[str], where: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"no {what} matches '{pattern}'",
        where=f"{where} ({len(names)} {what}s)",
        why=f"a pattern must match at least one {what}, so that a typo cannot change what is quantized",
        advice=f"{_suggestion(pattern, names)}, or drop the pattern",
    )


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    otherwise = "look at the names"
    if is_name(pattern):
        return suggestion(pattern, names, otherwise)
    # A pattern like '*.atn.to_q' resembles the tail of a name more than the whole of it.
    tails = dict.fromkeys(tail for name in names for tail in _tails(name))
    return suggestion(pattern.strip("*").strip("."), tails, otherwise)


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
