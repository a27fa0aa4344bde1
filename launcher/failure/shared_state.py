"""What every rank can read at any moment, whatever its main thread does: heartbeats, a request, the first failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from uuid import uuid4

from launcher.devices.launch import Launch
from launcher.failure.record import Failure
from launcher.ranks.rendezvous import Rendezvous
from quant_core.errors import DistributedError

_RUN, _STOP, _FAILURE = "run", "stop", "failure"


class StateLost(DistributedError):
    """The store that keeps the ranks together is gone, or its host is frozen."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself: that it lives (`count` grows), where it is, and how to find its process.

    `host` names the machine and the process namespace, so that a pid is looked up only where it means something.
    `memory` is in bytes.
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

    @property
    def work(self) -> str:
        """The stage, and how far it is."""
        return self.stage + (f" {self.done}/{self.total}" if self.total else "")


class SharedState:
    """Post and read short notes in the store that all ranks of one attempt share.

    Every method raises StateLost when the store does not answer, but for those that say how they end without it.
    """

    def __init__(self, rendezvous: Rendezvous, launch: Launch) -> None:
        self._store, self._host, self._launch = rendezvous.notes, rendezvous.host, launch

    def run(self) -> str:
        """Return a name that the ranks of this attempt, and no other's, share."""
        with self._answering():
            return self._store.compare_set(_RUN, "", uuid4().hex).decode()

    def publish(self, heartbeat: Heartbeat) -> None:
        """Replace this rank's heartbeat."""
        with self._answering():
            self._store.set(f"heartbeat/{self._launch.rank}", json.dumps(asdict(heartbeat)))

    def heartbeats(self) -> dict[int, Heartbeat]:
        """Return the last heartbeat of every rank that has come so far."""
        keys = [f"heartbeat/{rank}" for rank in range(self._launch.world)]
        with self._answering():
            if not self._store.check(keys):
                keys = [key for key in keys if self._store.check([key])]
            found = [Heartbeat(**json.loads(text)) for text in self._store.multi_get(keys)] if keys else []
        return {heartbeat.rank: heartbeat for heartbeat in found}

    def ask_to_stop(self, signal_name: str) -> None:
        """Ask all ranks to leave at their next safe point; the first request stays."""
        with self._answering():
            self._store.compare_set(_STOP, "", signal_name)

    def stop_asked(self) -> str | None:
        """Return the name of the signal that asked all ranks to leave, if one did."""
        with self._answering():
            return self._store.get(_STOP).decode() if self._store.check([_STOP]) else None

    def first_failure(self) -> Failure | None:
        """Return the failure that stands, if any."""
        with self._answering():
            return _read(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None

    def claim(self, failure: Failure) -> Failure:
        """Post a failure unless another rank was faster; returns the one that stands, this one if nobody can tell."""
        try:
            with self._answering():
                return _read(self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure))))
        except StateLost:
            return failure

    def speaks(self) -> bool:
        """Tell one rank, the first of those that are left to ask, to speak for all; each, if nobody can tell."""
        try:
            with self._answering():
                return self._store.add("speakers", 1) == 1
        except StateLost:
            return True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            raise StateLost(
                f"{self._host}, which keeps the ranks together, is gone or does not answer",
                why=" ".join(str(error).split())[:200],
                advice="read its output first; then run the same command again: finished parts are reused",
            ) from error


def _read(failure: bytes) -> Failure:
    return Failure.from_fields(json.loads(failure))
