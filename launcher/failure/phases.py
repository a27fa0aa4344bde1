"""Phases that all ranks fail as one: they wait for each other at the end, but never for long.

A rank that meets an error alone and exits leaves the others in a wait that ends minutes later with a wrong culprit.
So each phase that has no device collectives in it runs under `run_together`: every rank tells how it went, and all
raise the same error, that of the rank which failed first. Inside the model's own collectives this cannot work (the
others are waiting in the model, not here): there a failing rank must die, and its peers notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from launcher.failure.record import Failure
from launcher.ranks.agreement import gather_objects
from launcher.ranks.process_group import Ranks
from quant_core.errors import DistributedError

T = TypeVar("T")

# How long a rank that failed waits for the others, so that an error of all ranks is told once. Whoever is busy for
# longer learns of the failure from the shared state and leaves; all are gone within ten seconds.
_PATIENCE_S = 5.0


def run_together(ranks: Ranks, stage: str, fn: Callable[[], T]) -> T:
    """Run `fn` on every rank and return its local result, or raise one error on all ranks if any of them failed.

    The error keeps the kind and the text of the rank that failed first; `where` names that rank and the others.

    Raises:
        ExplainedError: of the first failure's kind.
        DistributedError: a rank did not arrive within the timeout.
        Exception: this rank's own, when the others are too busy to hear of it here.
    """
    if ranks.control is None:
        return fn()
    result: Any = None
    mine: Failure | None = None
    cause: Exception | None = None
    try:
        result = fn()
    except Exception as error:  # raised again below, on all ranks
        mine, cause = Failure.of(error, ranks.rank, stage), error
    try:
        outcomes = gather_objects(ranks, mine, what=stage, timeout_s=_PATIENCE_S if cause else None)
    except DistributedError:
        if cause is None:
            raise
        raise cause from None
    if failures := [failure for failure in outcomes if failure is not None]:
        raise combine(failures).error() from cause
    return result


def combine(failures: Sequence[Failure]) -> Failure:
    """Return one failure for a phase that failed on some ranks: the first, naming the others.

    An error about other ranks is never the first while there is one of another kind: it is a consequence.
    """
    first = min(failures, key=lambda failure: (failure.is_about_others, failure.at))
    alike = [f.rank for f in failures if f is not first and (f.kind, f.what) == (first.kind, first.what)]
    others = [f"then rank {f.rank}: {f.what}" for f in failures if f is not first and f.rank not in alike]
    return replace(first, alike=tuple(alike), why="; ".join([*filter(None, [first.why]), *others]))
