"""What may be spent on accuracy, and what each scheme costs: data, read by a command line too, so without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Inputs
from quant_core.schemes.treatment import FLOAT

# A float layer multiplies as a weight-only one does, and reads twice the bytes.
COSTS: Mapping[str, float] = {name: scheme.cost for name, scheme in SCHEMES.items()} | {FLOAT: 2.2}
# The schemes that quantize a layer's input in a range from calibration, and the one that measures each token.
STATIC = frozenset(name for name, scheme in SCHEMES.items() if scheme.observes_input)
DYNAMIC = next(name for name, scheme in SCHEMES.items() if scheme.inputs is Inputs.TOKENS)


@dataclass(frozen=True)
class Budget:
    """Say what may be spent, and when it is enough.

    dynamic: the share of the work that static layers need not do. cost: the mean cost of the work by the table of
    costs; None: what it is when that share is dynamic. bytes: of all quantizable layers; None: a tenth more than the
    cheapest treatments take. sqnr: of the output, in dB;
    where it is reached nothing more is spent; None: no limit.
    """

    dynamic: float = 1.0
    cost: float | None = None
    bytes: float | None = None
    sqnr: float | None = None

    def most_cost(self, costs: Mapping[str, float]) -> float:
        """Return the mean cost that is allowed."""
        if self.cost is not None:
            return self.cost
        static = min(costs[scheme] for scheme in STATIC)
        return static + self.dynamic * (costs[DYNAMIC] - static)


# How much larger than the best cheapest treatments the layers may be when nobody says it: room for small float ones.
GROWTH = 1.1

# By the word for it.
BUDGETS: Mapping[str, Budget] = {
    # A hundredth: modulations and embedders, which see one token and not thousands.
    "speed": Budget(dynamic=0.01, cost=1.01),
    "balanced": Budget(dynamic=1 / 3),
    "quality": Budget(dynamic=1.0),
}
