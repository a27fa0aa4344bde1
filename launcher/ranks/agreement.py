"""Exchanges between all ranks, on the control group, with bounded waits that name who is missing.

One comes before there is a group: which groups there are depends on options, and only ranks that have those alike can
form them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launcher.devices.launch import Launch
from launcher.journal.logs import log
from launcher.ranks.process_group import Ranks
from launcher.ranks.rendezvous import not_connected
from quant_core.errors import ConfigurationError, DistributedError

T = TypeVar("T")


def all_agree(ranks: Ranks, mine: bool, *, what: str = "an agreement") -> bool:
    """Return on all ranks whether every rank said yes."""
    return all(gather_objects(ranks, mine, what=what))


def group_agrees(group: dist.ProcessGroup | None, mine: bool) -> bool:
    """Return on all ranks of a gloo group whether every one said yes: what is asked often fills no log.

    group: None where a rank is alone.
    """
    if group is None:
        return mine
    answer = torch.tensor(int(mine))
    dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=group)
    return bool(answer)


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
        raise _not_all_came(what, ranks.timeout_s, error) from error
    return gathered


def require_alike(ranks: Ranks, mine: Mapping[str, Any] | None, *, what: str) -> Mapping[str, Any]:
    """Return the fields that all ranks have alike; a rank that has nothing to say (None) takes rank 0's.

    Raises:
        ConfigurationError: on all ranks, naming one that differs from rank 0, and in which fields.
    """
    return _alike(gather_objects(ranks, mine, what=f"comparing {what}"), what)


def require_alike_in_store(store: dist.Store | None, launch: Launch, mine: Mapping[str, Any], *, what: str) -> None:
    """Compare fields, which JSON can hold, where the ranks meet; store: None in a single process.

    Raises:
        ConfigurationError: as `require_alike` does.
        DistributedError: a rank did not come within the store's timeout.
    """
    if store is None:
        return
    try:
        turn = store.add(f"{what}/{launch.rank}", 1)  # a caller in Python may run several jobs
        keys = [f"{what}/{rank}/{turn}" for rank in range(launch.world)]
        store.set(keys[launch.rank], json.dumps(mine))
        store.wait(keys)
        everyone = [json.loads(text) for text in store.multi_get(keys)]
    except RuntimeError as error:
        raise not_connected(launch, f"comparing {what}", error) from error
    _alike(everyone, what)


def _alike(everyone: Sequence[Mapping[str, Any] | None], what: str) -> Mapping[str, Any]:
    first, *others = everyone
    assert first is not None, "rank 0 says something"
    for rank, fields in enumerate(others, start=1):
        theirs = first if fields is None else fields
        if different := [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]:
            shown = [f"{name}: {first.get(name, '(absent)')}, {theirs.get(name, '(absent)')}" for name in different[:5]]
            raise ConfigurationError(
                f"rank 0 and rank {rank} differ in {what}",
                where=", ".join(different[:5]),
                why="; ".join(shown),
                advice="start all ranks with the same command, on hosts with the same files and versions",
            )
    return first


def barrier(ranks: Ranks, what: str, timeout_s: float | None = None) -> None:
    """Wait until every rank has come here, at most the group's timeout.

    Raises:
        DistributedError: naming the ranks that did not come (rank 0 knows; the others point to it).
    """
    if ranks.control is None:
        return
    limit, began = ranks.timeout_s if timeout_s is None else timeout_s, time.monotonic()
    try:
        dist.monitored_barrier(ranks.control, timeout=timedelta(seconds=limit), wait_all_ranks=True)
    except RuntimeError as error:
        raise _not_all_came(what, limit, error) from error
    log(f"waited: {what}", wait=what, seconds=round(time.monotonic() - began, 3))


def _not_all_came(what: str, limit: float, error: RuntimeError) -> DistributedError:
    text = " ".join(str(error).split())
    # torch's own sentence on rank 0: "Ranks 1, 3 failed to pass monitoredBarrier in 1000 ms"
    named = re.search(r"Ranks ([\d, ]+) failed to pass", text)
    missing = f"rank {named[1].strip()}" if named else "another rank (rank 0, or the one that rank 0 names)"
    return DistributedError(
        f"{missing} did not come to {what}",
        where=what,
        why=f"waited at most {limit:g} s: {text[:200]}",
        advice="that rank died, hangs or is slower than --timeout_s: read its log first",
    )
