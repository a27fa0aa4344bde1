"""Fail together and decide together: between phases, all ranks wait for each other, but never for long.

A rank that meets an error alone and exits leaves the others in a wait that ends minutes later with a wrong culprit.
So each phase that has no device collectives in it runs under `run_together`: every rank tells how it went, and all
raise the same error, that of the rank which failed first. Inside the model's own collectives this cannot work (the
others are waiting in the model, not here): there a failing rank must die, and its peers notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from launcher.failure.failures import Failure
from launcher.ranks.process_group import Ranks
from quant_core.errors import DistributedError, ExplainedError

T = TypeVar("T")

# How long a rank that failed waits for the others, so that an error of all ranks is told once. Whoever is busy for
# longer learns of the failure from the board and leaves; all are gone within ten seconds.
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
        mine, cause = Failure.of(error, ranks.rank), error
    try:
        outcomes = gather_objects(ranks, mine, what=stage, timeout_s=_PATIENCE_S if cause else None)
    except DistributedError:
        if cause is None:
            raise
        raise cause from None
    if failures := [failure for failure in outcomes if failure is not None]:
        raise combine(failures, stage) from cause
    return result


def all_agree(ranks: Ranks, mine: bool, *, what: str = "an agreement") -> bool:
    """Return on all ranks whether every rank said yes."""
    return all(gather_objects(ranks, mine, what=what))


def gather_objects(ranks: Ranks, mine: T, *, what: str = "an exchange", timeout_s: float | None = None) -> list[T]:
    """Return every rank's object, in the order of ranks, on all ranks.

    Raises:
        DistributedError: a rank did not arrive within the timeout; it is named.
    """
    if ranks.control is None:
        return [mine]
    barrier(ranks, what, timeout_s)
    gathered: list[Any] = [None] * ranks.world
    try:
        dist.all_gather_object(gathered, mine, group=ranks.control)
    except RuntimeError as error:
        raise _not_all_came(ranks, what, ranks.timeout_s, error) from error
    return gathered


def barrier(ranks: Ranks, what: str, timeout_s: float | None = None) -> None:
    """Wait until every rank has come here, at most the group's timeout.

    Raises:
        DistributedError: naming the ranks that did not come (rank 0 knows; the others point to it).
    """
    if ranks.control is None:
        return
    limit = ranks.timeout_s if timeout_s is None else timeout_s
    try:
        dist.monitored_barrier(ranks.control, timeout=timedelta(seconds=limit), wait_all_ranks=True)
    except RuntimeError as error:
        raise _not_all_came(ranks, what, limit, error) from error


def combine(failures: Sequence[Failure], stage: str) -> ExplainedError:
    """Return one error for a stage that failed on some ranks: the first failure's, naming the others.

    An error about other ranks is never the first while there is one of another kind: it is a consequence.
    """
    first = min(failures, key=lambda failure: (failure.kind == DistributedError.__name__, failure.at))
    same = [f.rank for f in failures if f is not first and (f.kind, f.what) == (first.kind, first.what)]
    others = [f"rank {f.rank}: {f.what}" for f in failures if f is not first and f.rank not in same]
    place = f"rank{'s' * bool(same)} {', '.join(map(str, sorted([first.rank, *same])))}, {stage}"
    where = f"{place}: {first.where}" if first.where else place
    why = "; ".join([*filter(None, [first.why]), *(f"then {other}" for other in others)])
    combined = replace(first, where=where, why=why).error()
    combined.shared = True
    return combined


def _not_all_came(ranks: Ranks, what: str, limit: float, error: RuntimeError) -> DistributedError:
    text = " ".join(str(error).split())
    # torch's own sentence on rank 0: "Ranks 1, 3 failed to pass monitoredBarrier in 1000 ms"
    named = re.search(r"Ranks ([\d, ]+) failed to pass", text)
    missing = f"rank {named[1].strip()}" if named else "another rank (rank 0, or the one that rank 0 names)"
    return DistributedError(
        f"{missing} did not come to {what}",
        where=f"rank {ranks.rank}, {what}",
        why=f"waited at most {limit:g} s: {text[:200]}",
        advice="that rank died, hangs or is slower than --timeout_s: read its log first",
    )
