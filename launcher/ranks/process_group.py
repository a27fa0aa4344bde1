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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.job_config import JobConfig
from launcher.devices import npu
from launcher.devices.choice import available_cores, choose_backend, choose_device_index, choose_threads, find_cards
from launcher.devices.rank_variables import RankVariables, read_rank_variables
from launcher.ranks.mesh import Mesh, choose_tp_size
from model_adapters import load_options
from quant_core.errors import DistributedError


@dataclass(frozen=True)
class Ranks:
    """Know which rank this process is, where it computes, and how it talks to the others.

    The groups are None in a single process. `reasons` says in a line each what was chosen automatically and why.
    """

    rank: int
    local_rank: int
    world: int
    device: torch.device
    backend: str
    mesh: Mesh
    source: str
    timeout_s: int
    reasons: tuple[str, ...] = ()
    control: dist.ProcessGroup | None = None
    tp_device_group: dist.ProcessGroup | None = None
    tp_control: dist.ProcessGroup | None = None
    dp_control: dist.ProcessGroup | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether a launcher started this process; then the names of its files carry its rank."""
        return self.control is not None


def join(config: JobConfig, store: dist.Store | None = None) -> Ranks:
    """Find this process's rank and device, and connect it with the others; every rank calls this once.

    `store` is where the ranks meet; left out, one is made from the environment.

    What can be known to be wrong without the others is refused before waiting for them.

    Raises:
        ConfigurationError: the number of ranks does not fit the tensor-parallel size, or `--device_id` the launcher.
        EnvironmentFailure: rank variables contradict each other, or there is no such device.
        DistributedError: the other ranks did not come within the timeout.
    """
    launch = read_rank_variables(os.environ)
    mesh, mesh_reason = lay_out(config, launch)
    cards = find_cards(config.ranks.device, os.environ)
    index, device_reason = choose_device_index(cards, config.ranks.device_id, launch)
    device = torch.device(cards.kind, index) if cards.kind != "cpu" else torch.device("cpu")
    backend, backend_reason = choose_backend(device, shared=cards.shared_by(launch))
    threads, threads_reason = choose_threads(available_cores(), launch.local_world, os.environ.get("OMP_NUM_THREADS"))
    torch.set_num_threads(threads)
    if device.type != "cpu":
        torch.accelerator.set_device_index(index)
    reasons = (
        f"ranks: {launch.source}, rank {launch.rank} of {launch.world}",
        *f"mesh: {mesh}, {mesh_reason}".splitlines(),
        f"device: {device}, {device_reason}",
        f"backend: {backend_reason}",
        f"threads: {threads}, {threads_reason}",
    )
    groups = _form_groups(launch, mesh, device, backend, config.ranks.timeout_s, store) if launch.is_distributed else {}
    return Ranks(
        rank=launch.rank,
        local_rank=launch.local_rank,
        world=launch.world,
        device=device,
        backend=backend,
        mesh=mesh,
        source=launch.source,
        timeout_s=config.ranks.timeout_s,
        reasons=reasons,
        **groups,
    )


def leave(ranks: Ranks) -> None:
    """Take the groups down after success; after a failure do not call this, just exit.

    Tearing down waits for the other ranks, and one that failed will never come.
    """
    if ranks.control is not None:
        dist.monitored_barrier(ranks.control, timeout=timedelta(seconds=ranks.timeout_s))
        dist.destroy_process_group()


def lay_out(config: JobConfig, launch: RankVariables) -> tuple[Mesh, str]:
    """Return the mesh that a configuration means in a world of that size, and why.

    Raises:
        ConfigurationError: the world cannot be divided so.
    """
    name: str | None = getattr(config.pipeline, "device_type", None)
    known = load_options(config.model).DEVICE_TYPES
    tp_size, reason = choose_tp_size(
        launch.world,
        requested=config.ranks.tp_size,
        device_type=name,
        device_type_tp=known[name].tp_size if name in known else None,
        one_copy=next((other for other, kind in known.items() if kind.tp_size == launch.world), None),
    )
    return Mesh(launch.world, launch.rank, tp_size), reason


def _form_groups(
    launch: RankVariables,
    mesh: Mesh,
    device: torch.device,
    backend: str,
    timeout_s: int,
    store: dist.Store | None,
) -> dict[str, Any]:
    """Connect to all other ranks and make the groups; all ranks make all groups, in the same order."""
    device_options: Any = None
    device_timeout = control_timeout = timedelta(seconds=timeout_s)
    if device.type == "npu":
        npu.set_environment_defaults(os.environ)
        device_options = npu.group_options(os.environ)
        device_timeout = timedelta(seconds=npu.group_timeout_s(timeout_s, os.environ))
    try:
        dist.init_process_group(
            backend,
            init_method=launch.init_method if store is None else None,
            store=store,
            rank=launch.rank,
            world_size=launch.world,
            timeout=device_timeout,
            # NCCL binds early with it; on npu it would make every later gloo group fail.
            device_id=device if backend.endswith("cuda:nccl") else None,
        )
        return {
            "control": dist.new_group(backend="gloo", timeout=control_timeout),
            "tp_device_group": _own_group(mesh.tp_groups, timeout=device_timeout, pg_options=device_options),
            "tp_control": _own_group(mesh.tp_groups, timeout=control_timeout, backend="gloo"),
            "dp_control": _own_group(mesh.dp_groups, timeout=control_timeout, backend="gloo"),
        }
    except RuntimeError as error:
        raise DistributedError(
            f"the {launch.world} ranks could not connect",
            where=f"rank {launch.rank}, {launch.source}, {backend}",
            why=" ".join(str(error).split())[:300],
            advice="read the other ranks' errors; check MASTER_ADDR and MASTER_PORT, and that all ranks were started",
        ) from error


def _own_group(groups: list[list[int]], **options: Any) -> Any:
    """Make all of several disjoint groups and return the one that this rank is in."""
    own, _all = dist.new_subgroups_by_enumeration(groups, **options)
    return own
