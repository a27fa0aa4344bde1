"""Make one job out of many processes: join them into groups, and leave.

Three kinds of group, all with bounded waits:

    control            every rank, gloo: Python objects, barriers that name who is missing
    tp_device_group    the ranks of one copy of the model, over the device's backend: the model's own collectives
    tp_, dp_control    the same ranks, and the ranks of one shard, over gloo: statistics, prompts, agreements

Control is apart from the device's group because a barrier that names the missing ranks exists for plain gloo only,
and because a rank that hangs on its card can still be spoken about.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.job_config import JobConfig
from launcher.devices.choice import (
    available_cores,
    choose_backend,
    choose_device_index,
    choose_threads,
    find_cards,
    is_torchruns_default,
)
from launcher.devices.kinds import KINDS
from launcher.devices.launch import Launch
from launcher.ranks.mesh import Mesh, choose_tp_size
from launcher.ranks.rendezvous import not_connected

# All ranks have finished when they leave; whoever needs longer than this to say so keeps nobody.
_GOODBYE_S = 10.0


@dataclass(frozen=True)
class Ranks:
    """Know which rank this process is, where it computes, and how it talks to the others.

    The groups are None in a single process. `reasons` says in a line each what was chosen automatically and why.
    """

    mesh: Mesh
    device: torch.device
    backend: str
    timeout_s: int
    reasons: tuple[str, ...] = ()
    control: dist.ProcessGroup | None = None
    tp_device_group: dist.ProcessGroup | None = None
    tp_control: dist.ProcessGroup | None = None
    dp_control: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Which rank this process is."""
        return self.mesh.launch.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.mesh.launch.world

    @property
    def is_distributed(self) -> bool:
        """Whether a launcher started this process; then the names of its files carry its rank."""
        return self.mesh.launch.is_distributed


def join(config: JobConfig, launch: Launch, store: dist.Store | None = None) -> Ranks:
    """Find this process's device, and connect it with the other ranks; every rank calls this once.

    `store` is where the ranks meet; left out, one is made from the environment.

    What can be known to be wrong without the others is refused before waiting for them.

    Raises:
        ConfigurationError: the number of ranks does not fit the tensor-parallel size, or `--device_id` the launcher.
        EnvironmentFailure: there is no such device.
        DistributedError: the other ranks did not come within the timeout.
    """
    mesh, mesh_reason = lay_out(config, launch)
    cards = find_cards(config.ranks.device, os.environ)
    index, device_reason = choose_device_index(cards, config.ranks.device_id, launch)
    device = torch.device(cards.kind.name, *([index] if cards.kind.has_cards else []))
    backend, backend_reason = choose_backend(device, shared=cards.shared_by(launch))
    threads, threads_reason = choose_threads(
        available_cores(),
        launch.local_world,
        os.environ.get("OMP_NUM_THREADS"),
        is_default=is_torchruns_default(launch, os.environ),
    )
    torch.set_num_threads(threads)
    if cards.kind.has_cards:
        torch.accelerator.set_device_index(index)
    reasons = (
        f"ranks: {launch.source}, rank {launch.rank} of {launch.world}",
        *f"mesh: {mesh}, {mesh_reason}".splitlines(),
        f"device: {device}, {device_reason}",
        f"backend: {backend_reason}",
        f"threads: {threads}, {threads_reason}",
    )
    groups = _form_groups(mesh, device, backend, config.ranks.timeout_s, store) if launch.is_distributed else {}
    return Ranks(
        mesh=mesh,
        device=device,
        backend=backend,
        timeout_s=config.ranks.timeout_s,
        reasons=reasons,
        **groups,
    )


def part(ranks: Ranks) -> None:
    """Take the groups down after success, which all ranks have come to; after a failure just exit.

    Nobody watches any more, so the wait for the others is short: until then the host of the store must not go, nor a
    process vanish in front of a monitor. What has been done is done, also when one of them does not answer.
    """
    if ranks.control is not None:
        with suppress(RuntimeError):
            dist.monitored_barrier(ranks.control, timeout=timedelta(seconds=_GOODBYE_S))
            dist.destroy_process_group()


def lay_out(config: JobConfig, launch: Launch) -> tuple[Mesh, str]:
    """Return the mesh that a configuration means in a world of that size, and why.

    Raises:
        ConfigurationError: the world cannot be divided so.
    """
    hardware = config.pipeline.hardware
    tp_size, reason = choose_tp_size(
        launch.world,
        requested=config.ranks.tp_size,
        device_type=hardware and hardware.name,
        device_type_tp=hardware and hardware.tp_size,
        one_copy=next((each.name for each in config.pipeline.DEVICE_TYPES if each.tp_size == launch.world), None),
    )
    return Mesh(launch, tp_size), reason


def _form_groups(
    mesh: Mesh,
    device: torch.device,
    backend: str,
    timeout_s: int,
    store: dist.Store | None,
) -> dict[str, Any]:
    """Connect to all other ranks and make the groups; all ranks make all groups, in the same order."""
    launch, kind = mesh.launch, KINDS[device.type]
    kind.set_environment(os.environ)
    options = kind.group_options(os.environ)
    control_timeout = timedelta(seconds=timeout_s)
    device_timeout = timedelta(seconds=kind.group_timeout_s(timeout_s, os.environ))
    try:
        dist.init_process_group(
            backend,
            init_method=launch.init_method if store is None else None,
            store=store,
            rank=launch.rank,
            world_size=launch.world,
            timeout=device_timeout,
            device_id=device if kind.connects_early and not backend.endswith("gloo") else None,
        )
        return {
            "control": dist.new_group(backend="gloo", timeout=control_timeout),
            "tp_device_group": _own_group(mesh.tp_groups, timeout=device_timeout, pg_options=options),
            "tp_control": _own_group(mesh.tp_groups, timeout=control_timeout, backend="gloo"),
            "dp_control": _own_group(mesh.dp_groups, timeout=control_timeout, backend="gloo"),
        }
    except RuntimeError as error:
        raise not_connected(launch, backend, error) from error


def _own_group(groups: list[list[int]], **options: Any) -> Any:
    """Make all of several disjoint groups and return the one that this rank is in."""
    own, _all = dist.new_subgroups_by_enumeration(groups, **options)
    return own
