"""What earlier runs left: processes that nobody waits for, and an account that says one still runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from launcher.doctor.finding import Finding
from launcher.failure.liveness import here
from launcher.journal.status import STATUS, read_status

# How the command line of a rank or of its starter reads: `-m launcher MODEL`, `quant-launcher MODEL`.
_OURS = ("launcher", "quant-launcher")
# What torchrun, and our own starter, give each rank; its parent is then one of theirs.
_RANK = "TORCHELASTIC_RUN_ID"


def left_over(folder: Path) -> Iterator[Finding]:
    """Find processes of jobs, and the account in a job's folder that no process keeps any more."""
    mine = {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    jobs = [found for each in psutil.process_iter() if each.pid not in mine and (found := _job(each))]
    yield from jobs or [Finding("ok", "processes", "none of another job")]
    yield from _account(folder)


def _job(process: psutil.Process) -> Finding | None:
    """Return what there is to say of a process of a job; None of any other, and of one that ends meanwhile."""
    with suppress(psutil.Error):
        if _is_of_a_job(process):
            what, said = f"process {process.pid}", " ".join(process.cmdline())[:100]
            if _is_orphan(process):
                return Finding("!!", what, f"{said}: its starter is gone", f"kill {process.pid}, if it is not wanted")
            return Finding("--", what, f"{said}: a job that runs")
    return None


def _is_of_a_job(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        words = process.cmdline()
        modules = [word for flag, word in pairwise(words) if flag == "-m"]
        return any(Path(word).name in _OURS for word in (*modules, *words[:2]))
    return False


def _is_orphan(process: psutil.Process) -> bool:
    """Tell whether it is a rank whose parent is no starter of ranks: init, or whoever takes orphans on this host."""
    with suppress(psutil.Error):
        parent = process.parent()
        return _RANK in process.environ() and (parent is None or not _is_of_a_job(parent))
    return False


def _account(folder: Path) -> Iterator[Finding]:
    status = read_status(folder)
    if status is None or status.get("state") != "running":
        return
    own = [rank for rank in status.get("ranks", []) if rank.get("host") == here()]
    gone = [rank for rank in own if not psutil.pid_exists(int(rank.get("pid", -1)))]
    if gone:
        yield Finding(
            "!!",
            STATUS,
            f"{folder / STATUS} says that a job runs, but {len(gone)} of its ranks are gone",
            "run the same command again: finished parts are reused",
        )
