"""Choose a treatment for each layer: the least error at the model's output that a budget allows.

Errors of layers add up at the output, so the choice is a knapsack. It is filled greedily: every layer starts with the
best of its cheapest treatments; then the change that takes away most error for its cost is made, again and again, as
long as the budget holds. A layer never gets a treatment that was measured worse than a cheaper or plainer one.

Worked example, two layers of equal work, costs 1 static and 1.15 dynamic, and at most 1.08 in the mean. Static errors
4e-4 and 1e-4, dynamic ones 1e-4 and 0.9e-4: the first layer's change takes 3e-4 away and brings the mean to 1.075;
the second's would take 1e-5 and exceed it. So one layer is dynamic and the error is 2e-4 (37 dB), not 5e-4 (33 dB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quant_core.errors import ConfigurationError
from quant_core.quality.budget import COSTS, GROWTH, STATIC, Budget
from quant_core.schemes.treatment import Treatment

# An improvement below this part of a layer's error is no reason for a treatment that is less plain or costs more.
_LEAST_GAIN = 0.02
# Sums may exceed a limit by this factor, which rounding makes.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Candidate:
    """Say what a treatment of a layer costs: error, the share of the output's energy; cost; bytes."""

    treatment: Treatment
    error: float
    cost: float
    bytes: float

    @property
    def sqnr(self) -> float:
        """The error in dB."""
        return decibels(self.error)

    @property
    def is_static(self) -> bool:
        """Whether a range from calibration quantizes the layer's input."""
        return self.treatment.scheme in STATIC


@dataclass(frozen=True)
class LayerChoice:
    """Hold one layer's candidates, its work (multiplications of all records) and what was chosen, with the reason."""

    name: str
    work: float
    candidates: Sequence[Candidate]
    chosen: Candidate
    reason: str


@dataclass
class Choice:
    """Hold the choices for all layers and what they come to; measured: of the whole model, in dB, once it was tried."""

    layers: list[LayerChoice] = field(default_factory=list)
    measured: float | None = None

    @property
    def error(self) -> float:
        """The error at the output, a share of its energy."""
        return math.fsum(layer.chosen.error for layer in self.layers)

    @property
    def sqnr(self) -> float:
        """The same in dB."""
        return decibels(self.error)

    @property
    def static_share(self) -> float:
        """The share of the work that static layers do."""
        total = math.fsum(layer.work for layer in self.layers)
        return math.fsum(layer.work for layer in self.layers if layer.chosen.is_static) / total

    @property
    def cost(self) -> float:
        """The mean cost of the work, 1 where all of it is static."""
        return math.fsum(c.chosen.cost for c in self.layers) / math.fsum(c.work for c in self.layers)

    @property
    def bytes(self) -> float:
        """The bytes of all layers."""
        return math.fsum(layer.chosen.bytes for layer in self.layers)

    @property
    def layer_schemes(self) -> dict[str, str]:
        """Return the map that `--layer_schemes` reads."""
        return {layer.name: str(layer.chosen.treatment) for layer in self.layers}


def choose(
    found: Mapping[str, tuple[float, Sequence[Candidate]]], budget: Budget, costs: Mapping[str, float] = COSTS
) -> Choice:
    """Choose for each layer among its candidates. found: work and candidates by layer, plain ones first.

    Raises ConfigurationError when the layers do not fit in the budget's bytes.
    """
    useful = {name: _useful(candidates) for name, (_, candidates) in found.items()}
    chosen = {name: candidates[0] for name, candidates in useful.items()}
    if budget.bytes is not None and math.fsum(c.bytes for c in chosen.values()) > budget.bytes:
        chosen = {name: min(candidates, key=lambda c: (c.cost, c.bytes)) for name, candidates in useful.items()}
    spend = _Spending(budget, budget.most_cost(costs), {name: work for name, (work, _) in found.items()}, chosen)
    while not spend.is_enough():
        moves = [
            (_worth(chosen[name], other), name, other)
            for name, candidates in useful.items()
            for other in candidates
            if other.error < chosen[name].error and spend.allows(name, chosen[name], other)
        ]
        if not moves:
            break
        _, name, other = max(moves, key=lambda move: move[0])
        spend.move(name, chosen[name], other)
        chosen[name] = other
    layers = [
        LayerChoice(name, of_layer, candidates, chosen[name], _reason(chosen[name], candidates, useful[name]))
        for name, (of_layer, candidates) in found.items()
    ]
    choice = Choice(layers)
    if budget.bytes is not None and choice.bytes > budget.bytes * _ROUNDING:
        raise ConfigurationError(
            f"the layers do not fit in {budget.bytes:.0f} bytes",
            where=f"budget, {len(layers)} layers",
            why=f"the smallest of those that are cheapest to run take {choice.bytes:.0f}",
            advice=f"bytes={math.ceil(choice.bytes)} or more, or no limit",
        )
    return choice


class _Spending:
    """Tell what the budget allows on top of what is spent: error, cost, work that is not static, and bytes."""

    def __init__(
        self, budget: Budget, most_cost: float, work: Mapping[str, float], chosen: Mapping[str, Candidate]
    ) -> None:
        self._work, total = work, math.fsum(work.values())
        sums = zip(*(self._amounts(name, candidate) for name, candidate in chosen.items()))
        self._error, *self._spent = [math.fsum(amounts) for amounts in sums]
        most_bytes = GROWTH * self._spent[-1] if budget.bytes is None else budget.bytes
        self._most = [limit * _ROUNDING for limit in (most_cost * total, budget.dynamic * total, most_bytes)]
        self._enough = None if budget.sqnr is None else 10 ** (-budget.sqnr / 10)

    def is_enough(self) -> bool:
        """Tell whether the wanted quality is reached."""
        return self._enough is not None and self._error <= self._enough

    def allows(self, name: str, old: Candidate, new: Candidate) -> bool:
        """Tell whether a layer may change; what is beyond a limit may not grow, and what costs nothing is allowed."""
        _, *before = self._amounts(name, old)
        _, *after = self._amounts(name, new)
        return all(b <= a or spent - a + b <= most for spent, most, a, b in zip(self._spent, self._most, before, after))

    def move(self, name: str, old: Candidate, new: Candidate) -> None:
        """Spend what a change costs."""
        error, *spent = (b - a for a, b in zip(self._amounts(name, old), self._amounts(name, new)))
        self._error += error
        self._spent = [each + more for each, more in zip(self._spent, spent)]

    def _amounts(self, name: str, candidate: Candidate) -> tuple[float, float, float, float]:
        moving = 0.0 if candidate.is_static else self._work[name]
        return candidate.error, candidate.cost, moving, candidate.bytes


def decibels(error: float) -> float:
    """Return an error, a share of the signal's energy, as signal over noise in dB."""
    return -10 * math.log10(max(error, 1e-15))


def _useful(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one beats: at most as dear, at most as large, and as good or better.

    Of two that are nearly as good, the one in front, which is plainer, beats the other. The best of the cheapest comes
    first.
    """
    kept = [
        each
        for index, each in enumerate(candidates)
        if not any(_beats(other, each, in_front=place < index) for place, other in enumerate(candidates))
    ]
    return sorted(kept, key=lambda candidate: (candidate.cost, candidate.error))


def _beats(other: Candidate, each: Candidate, *, in_front: bool) -> bool:
    if other is each or other.cost > each.cost or other.bytes > each.bytes:
        return False
    return other.error * (1 - _LEAST_GAIN) <= each.error if in_front else other.error < each.error


def _worth(old: Candidate, new: Candidate) -> float:
    more = new.cost - old.cost
    return math.inf if more <= 0 else (old.error - new.error) / more


def _reason(chosen: Candidate, candidates: Sequence[Candidate], useful: Sequence[Candidate]) -> str:
    if len(candidates) == 1:
        return "nothing else may be chosen"
    best = min(candidates, key=lambda candidate: candidate.error)
    smoothed = [c for c in candidates if c.treatment == Treatment(chosen.treatment.scheme, smoothed=True)]
    plain = [c for c in candidates if c.treatment == Treatment(chosen.treatment.scheme)]
    said = []
    if chosen is useful[0]:
        said.append("the best of the cheapest" if len(useful) > 1 else "nothing dearer is better")
    else:
        said.append(f"takes away {1 - chosen.error / useful[0].error:.0%} of the error of {useful[0].treatment}")
    if chosen is not best and best in useful:
        said.append(f"{best.treatment} is better and beyond the budget or not worth its cost")
    if smoothed and plain and not chosen.treatment.smoothed:
        said.append(f"outlier suppression does not help it ({smoothed[0].error:.1e}, plain {plain[0].error:.1e})")
    return "; ".join(said)
