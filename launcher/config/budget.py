"""Read what may be spent on accuracy: a word, or numbers that replace what the word stands for.

--budget balanced
--budget balanced sqnr=35 bytes=7e9         at most a third of the work not static, 7 GB, and not more than 35 dB
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from quant_core.errors import ConfigurationError, suggestion
from quant_core.quality.budget import BUDGETS, COSTS, Budget

BUDGET = "--budget"
SCHEME_COSTS = "--scheme_costs"
_NUMBERS = tuple(field.name for field in fields(Budget))


def budget_of(words: Sequence[str]) -> Budget:
    """Return what the words allow; raises ConfigurationError naming the word that says nothing."""
    budget = BUDGETS["balanced"]
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and name in BUDGETS:
            budget = BUDGETS[name]
        elif equals and name in _NUMBERS:
            budget = replace(budget, **{name: _number(value, BUDGET, word, example="dynamic=0.25")})
        else:
            raise ConfigurationError(
                f"no budget is called '{word}'",
                where=BUDGET,
                why=f"it is {', '.join(BUDGETS)}, or numbers: {', '.join(f'{name}=X' for name in _NUMBERS)}",
                advice=suggestion(name, _NUMBERS if equals else BUDGETS),
            )
    return budget


def _checked(words: tuple[str, ...]) -> tuple[str, ...]:
    budget_of(words)
    return words


def read_costs(given: Any) -> Any:
    """Return the costs by scheme; raises ConfigurationError for what is no scheme or no number from 0 on."""
    if not isinstance(given, (Mapping, list, tuple)):
        return given
    pairs = given.items() if isinstance(given, Mapping) else [str(word).partition("=")[::2] for word in given]
    found = {}
    for scheme, value in pairs:
        if scheme not in COSTS:
            raise ConfigurationError(
                f"no scheme is called '{scheme}'",
                where=SCHEME_COSTS,
                why=f"a cost is of one of {', '.join(COSTS)}: w8a8_dynamic=1.2",
                advice=suggestion(str(scheme), COSTS),
            )
        example = f"{scheme}={COSTS[scheme]:g}"
        found[scheme] = _number(value, SCHEME_COSTS, f"{scheme}={value}", example=example)
    return found


def _number(value: Any, where: str, word: str, *, example: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigurationError(f"'{word}' is no number", where=where, why="a number from 0 on", advice=example)
    return number


BudgetWords = Annotated[tuple[str, ...], AfterValidator(_checked)]
SchemeCosts = Annotated[dict[str, float], BeforeValidator(read_costs)]
