"""What every rank can read at any moment, whatever its main thread does: beats, a request to stop, the first failure.

It lies in torch's key-value store, over a connection of its own. Under torchrun the agent hosts the store, so it
outlives every rank; else rank 0 does. A single process has one in memory, and no special case follows from it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from launcher.devices.launch import Launch
from launcher.failure.failures import Failure
from quant_core.errors import DistributedError

# Reading a few keys takes a millisecond; a store that needs longer than this is gone or its host is frozen.
_ANSWER_S = 10.0
_STOP, _FAILURE = "stop", "failure"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself: that it lives (`count` grows), where it is, and how to find its process.

    `host` names the machine and the process namespace, so that a pid is looked up only where it means something.
    `memory` is in bytes of the host.
    """

    rank: int
    count: int
    pid: int
    started: float
    host: str
    stage: str = ""
    done: int = 0
    total: int = 0
    step: int | None = None
    memory: int = 0
    finished: bool = False


class Board:
    """Post and read short notes in a store that all ranks of one attempt share."""

    def __init__(self, store: dist.Store, launch: Launch) -> None:
        self._launch = launch
        self._store = store

    def beat(self, beat: Beat) -> None:
        """Replace this rank's beat."""
        self._store.set(f"beat/{self._launch.rank}", json.dumps(asdict(beat)))

    def beats(self) -> dict[int, Beat]:
        """Return the last beat of every rank that has come so far."""
        keys = [f"beat/{rank}" for rank in range(self._launch.world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        found = [Beat(**json.loads(text)) for text in self._store.multi_get(keys)] if keys else []
        return {beat.rank: beat for beat in found}

    def ask_to_stop(self, signal_name: str) -> None:
        """Ask all ranks to leave at their next safe point; the first request stays."""
        self._store.compare_set(_STOP, "", signal_name)

    def stop_asked(self) -> str | None:
        """Return the name of the signal that asked all ranks to leave, if one did."""
        return self._store.get(_STOP).decode() if self._store.check([_STOP]) else None

    def claim(self, failure: Failure) -> Failure:
        """Post a failure unless another rank was faster; returns the one that stands."""
        return Failure.from_json(self._store.compare_set(_FAILURE, "", failure.to_json()).decode())

    def speaks(self) -> bool:
        """Tell one rank, the first that asks, to speak for all."""
        return self._store.add("speakers", 1) == 1

    def first_failure(self) -> Failure | None:
        """Return the failure that stands, if any."""
        return Failure.from_json(self._store.get(_FAILURE).decode()) if self._store.check([_FAILURE]) else None


@dataclass(frozen=True)
class Stores:
    """The connections of one rank to the shared store: for forming groups, and for the board."""

    groups: dist.Store | None
    board: Board


def connect(launch: Launch, timeout_s: float) -> Stores:
    """Connect with the store that `launch` points to; a single process gets a board of its own.

    Raises:
        DistributedError: the host of the store did not answer within `timeout_s` seconds.
    """
    if not launch.is_distributed:
        return Stores(None, Board(dist.HashStore(), launch))
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        groups = _store(launch, timeout_s, hosts=launch.rank == 0 and not agent_hosts)
        notes = _store(launch, min(timeout_s, _ANSWER_S), hosts=False)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the {launch.world} ranks could not connect",
            where=f"{launch.source}, {':'.join(map(str, _address(launch)))}",
            why=" ".join(str(error).split())[:300],
            advice="read the other ranks' errors; check MASTER_ADDR and MASTER_PORT, and that all ranks were started",
        ) from error
    board = Board(dist.PrefixStore(f"board/{attempt}", notes), launch)
    return Stores(dist.PrefixStore(f"groups/{attempt}", groups), board)


def _store(launch: Launch, timeout_s: float, *, hosts: bool) -> dist.TCPStore:
    address, port = _address(launch)
    return dist.TCPStore(
        address,
        port,
        launch.world,
        is_master=hosts,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _address(launch: Launch) -> tuple[str, int]:
    if launch.init_method and launch.init_method != "env://":
        found = urlsplit(launch.init_method)
        return found.hostname or "127.0.0.1", found.port or 0
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
