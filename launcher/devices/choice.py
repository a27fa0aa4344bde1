"""Choose this process's device, its communication backend and its threads, each with the reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from launcher.devices.kinds import KINDS, DeviceKind
from launcher.devices.launch import Launch
from quant_core.errors import ConfigurationError, EnvironmentFailure

# Ranks that torchrun starts have one environment. Tasks of srun may have a card each, which each of them sees as its
# only one: nothing that a rank sees alone tells that from a card that all share.
_SHOW_ALL = "if srun gave each task its own card, let every task see all: --gpus-per-node N --gpu-bind=none"


@dataclass(frozen=True)
class Cards:
    """Count the devices of one kind that this process can see; `visible` shows the variable that may hide some."""

    kind: DeviceKind
    count: int
    visible: str = ""

    def shared_by(self, launch: Launch) -> bool:
        """Whether several ranks of this host have to use one card, and can."""
        return self.kind.is_shareable and 0 < self.count < launch.local_world


def find_cards(name: str, environ: Mapping[str, str]) -> Cards:
    """Look for devices of the kind of that name, importing what that needs.

    Raises:
        EnvironmentFailure: what it needs cannot be imported.
    """
    kind = KINDS[name]
    kind.load()
    if not kind.has_cards:
        return Cards(kind, 1)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == name else 0
    return Cards(kind, count, f"{kind.visible}={environ.get(kind.visible, '(unset)')}")


def choose_device_index(cards: Cards, device_id: int, launch: Launch) -> tuple[int, str]:
    """Return the index of this process's device among those it can see, and why.

    Raises:
        ConfigurationError: `--device_id` was given although a launcher places the ranks.
        EnvironmentFailure: there is no such device.
    """
    kind = cards.kind
    if not kind.has_cards:
        return 0, f"the {kind.noun}, as --device {kind.name} asks"
    if launch.is_distributed and device_id:
        raise ConfigurationError(
            f"--device_id {device_id} cannot be given to {launch.world} ranks",
            where="--device_id",
            why=f"under {launch.source} each rank takes the device of its local rank",
            advice=f"drop --device_id, and choose cards with {kind.visible}",
        )
    if cards.shared_by(launch):
        index = launch.local_rank % cards.count
        remark = f"; {_SHOW_ALL}" if launch.source == "srun" else ""
        return index, f"{launch.local_world} ranks share {cards.count} {kind.noun}{'s' * (cards.count > 1)}{remark}"
    wanted, source = (launch.local_rank, "local rank") if launch.is_distributed else (device_id, "--device_id")
    if wanted >= cards.count:
        hint = f"; {_SHOW_ALL}" if launch.source == "srun" and cards.count else ""
        raise EnvironmentFailure(
            f"{kind.name} {wanted} does not exist: this process sees {cards.count or 'none'}",
            where=f"{source} {wanted}, {cards.visible}",
            why=f"the {source} picks one of the devices that this process sees",
            advice=f"{kind.listing} lists those of the host; start fewer ranks, or use --device cpu{hint}",
        )
    return wanted, f"{source} {wanted} of {cards.count} visible"


def choose_backend(device: torch.device, *, shared: bool) -> tuple[str, str]:
    """Return the backends for `init_process_group`, host tensors always over gloo, and why."""
    native = dist.get_default_backend_for_device(device)
    if not KINDS[device.type].has_cards:
        return native, f"{native}, the backend of host memory"
    if shared:
        noun = KINDS[device.type].noun
        return f"cpu:gloo,{device.type}:gloo", f"gloo, because {native.upper()} refuses two ranks on one {noun}"
    return f"cpu:gloo,{device.type}:{native}", f"{native}, the backend of {device.type}"


def choose_threads(cores: int, local_world: int, omp_num_threads: str | None, *, is_default: bool) -> tuple[int, str]:
    """Return how many threads torch may use in this process, and why: what the user set, else a share of the cores."""
    if omp_num_threads and omp_num_threads.isdecimal() and int(omp_num_threads) and not is_default:
        return int(omp_num_threads), f"OMP_NUM_THREADS={omp_num_threads}"
    remark = f"; OMP_NUM_THREADS={omp_num_threads} is torchrun's own" if is_default else ""
    return max(
        1, cores // local_world
    ), f"{cores} cores, {local_world} rank{'s' * (local_world > 1)} on this host{remark}"


def is_torchruns_default(launch: Launch, environ: Mapping[str, str]) -> bool:
    """Tell whether OMP_NUM_THREADS=1 comes from torchrun, which sets it for its ranks where the user has set nothing.

    It does so in its own process, this one's parent, whose environment at its start the kernel still shows. Where that
    cannot be read, 1 is taken for torchrun's.
    """
    if launch.source != "torchrun" or environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return True


def available_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use: of its affinity, and of a container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (quota_file.read_text().split() if quota_file.is_file() else ("max", "1"))[:2]
    return affinity if quota == "max" else max(1, min(affinity, int(quota) // int(period)))
