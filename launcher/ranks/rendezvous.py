"""Where the ranks of one attempt meet: torch's key-value store.

Under torchrun the agent hosts it, so it outlives every rank; else rank 0 does. A single process has one in memory, and
no special case follows from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from launcher.devices.launch import Launch
from quant_core.errors import DistributedError

# Reading a few keys takes a millisecond; a store that needs longer than this is gone or its host is frozen.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Rendezvous:
    """Two connections of one rank to the store: for forming groups (None in a single process), and for short notes.

    `host` is who keeps the store.
    """

    host: str
    groups: dist.Store | None
    notes: dist.Store


def meet(launch: Launch, timeout_s: float) -> Rendezvous:
    """Connect with the store that `launch` points to.

    Raises:
        DistributedError: its host did not answer within `timeout_s` seconds.
    """
    if not launch.is_distributed:
        return Rendezvous("this process", None, dist.HashStore())
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    names = f"{_step(launch)}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        groups = _store(launch, timeout_s, hosts=launch.rank == 0 and not agent_hosts)
        notes = _store(launch, min(timeout_s, _ANSWER_S), hosts=False)
    except (RuntimeError, ValueError) as error:
        raise not_connected(launch, ":".join(map(str, _address(launch))), error) from error
    return Rendezvous(
        "torchrun" if agent_hosts else "rank 0",
        dist.PrefixStore(f"groups{names}", groups),
        dist.PrefixStore(f"notes{names}", notes),
    )


def not_connected(launch: Launch, way: str, error: Exception) -> DistributedError:
    """Return the error of ranks that did not meet on some way."""
    return DistributedError(
        f"the {launch.world} ranks could not connect",
        where=f"{launch.source}, {way}",
        why=" ".join(str(error).split())[:300],
        advice="read the other ranks' errors; check MASTER_ADDR and MASTER_PORT, and that all ranks were started",
    )


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


def _step(launch: Launch) -> str:
    """Return the path in the ranks' meeting place: what came to another's port by mistake is not among its ranks."""
    return urlsplit(launch.init_method or "").path


def _address(launch: Launch) -> tuple[str, int]:
    if launch.init_method and launch.init_method != "env://":
        found = urlsplit(launch.init_method)
        return found.hostname or "127.0.0.1", found.port or 0
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
