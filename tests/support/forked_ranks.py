"""Ranks that are started at no cost: forked from a process that has imported torch, diffusers and the launcher.

Importing is most of what a tiny job does, six seconds of a processor a rank. So a test about what ranks compute and
write has them forked, by the standard library's fork server; to them it looks as if torchrun had started them, with
its variables, and a store that their starter hosts. Starting, failing, signals and statuses are torchrun's business
and the supervisor's: tests of those start the real ones (`torchrun.py`), as does a whole job of two and of four ranks.

A forked rank is unlike a started one in what Python and libraries decide when they load: all ranks hash strings alike,
and variables that libraries read at their import are those of this process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from tests.support.torchrun import ROOT, Finished, environment

# In which the other ranks leave by themselves when one has failed; torchrun's.
_GRACE_S = 30


def run_forked(
    ranks: int, *command: str | Path, timeout_s: float = 240, environ: Mapping[str, str] | None = None
) -> Finished:
    """Run what `run_torchrun` runs; the status is that of the rank that failed first, or 0.

    A single rank is a process by itself, as `python COMMAND...` is.
    """
    words, start = [str(word) for word in command], time.monotonic()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent hosts it, too
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        of_ranks = [_torchrun(rank, ranks, store.port) for rank in range(ranks)] if ranks > 1 else [{}]
        variables = [environment(environ or {}) | own for own in of_ranks]
        family = [_server().Process(target=_be_rank, args=(words, own, said)) for own in variables]
        try:
            for rank in family:
                rank.start()
            status = _wait_for_all(family, time.monotonic() + timeout_s)  # from now on the server is there
        finally:
            _end(family)
        stdout, stderr = (path.read_text() if path.exists() else "" for path in said)
    return Finished(status, stdout, stderr, time.monotonic() - start)


def start_forked(*command: str | Path, terminal: Path) -> ForkServerProcess:
    """Start what `python COMMAND...` does in a forked process that prints into a pipe or terminal, by its path."""
    words = [str(word) for word in command]
    started = _server().Process(target=_be_rank, args=(words, environment({}), [terminal, terminal]))
    started.start()
    return started


@cache
def _server() -> ForkServerContext:
    """Start the fork server, which ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    with patch.dict(os.environ, environment({})):
        ensure_running()
    return context


def _torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun gives a rank on a single host."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    numbers |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), ranks) | {"GROUP_WORLD_SIZE": 1}
    elastic = {"RUN_ID": "forked", "RESTART_COUNT": "0", "MAX_RESTARTS": "0", "USE_AGENT_STORE": "True"}
    return {
        "MASTER_ADDR": "127.0.0.1",
        "ROLE_NAME": "default",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **{name: str(number) for name, number in numbers.items()},
        **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()},
    }


def _wait_for_all(family: list[ForkServerProcess], until: float) -> int | None:
    """Return the first status that is not 0; after it the others are asked to leave. None when time is up."""
    running, status = list(family), 0
    while running:
        if not (ended := wait([rank.sentinel for rank in running], until - time.monotonic())):
            return status or None
        for rank in [rank for rank in running if rank.sentinel in ended]:
            running.remove(rank)
            rank.join()
            status = status or rank.exitcode or 0
        if status:
            for rank in running:
                rank.terminate()
            until = min(until, time.monotonic() + _GRACE_S)
    return status


def _end(family: list[ForkServerProcess]) -> None:
    """Kill the ranks that are left, each with what it started."""
    for rank in family:
        if rank.is_alive() and rank.pid:
            with suppress(ProcessLookupError):  # it has no session yet
                os.killpg(rank.pid, signal.SIGKILL)
            rank.kill()
            rank.join()


def _be_rank(words: list[str], environ: dict[str, str], said: list[Path]) -> None:
    """Run the words of a command in this forked process, as `python WORDS...` would."""
    import numpy

    from tests.support.imported import VARIABLES_SET

    os.setsid()
    numpy.random.seed()  # what every interpreter does; Python's own numbers are seeded by the fork, torch's are fixed
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(VARIABLES_SET | environ)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), descriptor)
    sys.path[:0] = environ["PYTHONPATH"].split(os.pathsep)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
