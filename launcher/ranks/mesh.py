"""Lay a world of ranks out as dp × tp: arithmetic only, no process group.

A tensor-parallel group holds one copy of the model and is made of neighbouring ranks, because neighbours sit on one
host and talk most; the copies share the prompts. With 6 ranks and tp_size 2:

    rank      0  1 | 2  3 | 4  5
    tp_rank   0  1 | 0  1 | 0  1     which shard of the model
    dp_rank   0  0 | 1  1 | 2  2     which share of the prompts
    tp groups (0 1) (2 3) (4 5), dp groups (0 2 4) (1 3 5)
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.devices.launch import Launch
from quant_core.errors import ConfigurationError


@dataclass(frozen=True)
class Mesh:
    """Place one rank in a world of `dp_size` copies of the model, `tp_size` ranks each."""

    launch: Launch
    tp_size: int = 1

    @property
    def rank(self) -> int:
        """Which rank of the world this is."""
        return self.launch.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.launch.world

    @property
    def dp_size(self) -> int:
        """Number of copies of the model."""
        return self.world // self.tp_size

    @property
    def tp_rank(self) -> int:
        """Which shard of the model this rank holds."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Which copy of the model, hence which share of the prompts, this rank works on."""
        return self.rank // self.tp_size

    @property
    def tp_groups(self) -> list[list[int]]:
        """All tensor-parallel groups, in the order of their copies."""
        return [list(range(start, start + self.tp_size)) for start in range(0, self.world, self.tp_size)]

    @property
    def dp_groups(self) -> list[list[int]]:
        """All data-parallel groups, in the order of their shards."""
        return [list(range(shard, self.world, self.tp_size)) for shard in range(self.tp_size)]

    @property
    def tp_ranks(self) -> list[int]:
        """The ranks that hold one copy of the model together with this one."""
        return self.tp_groups[self.dp_rank]

    def __str__(self) -> str:
        return f"world {self.world} = dp {self.dp_size} × tp {self.tp_size}"


def choose_tp_size(
    world: int,
    *,
    requested: int | None = None,
    device_type: str | None = None,
    device_type_tp: int | None = None,
    one_copy: str | None = None,
) -> tuple[int, str]:
    """Return how many ranks hold one copy of the model, and why; a second line of the reason is a warning.

    `requested` is `--tp_size` and wins; `device_type_tp` is what the model's device type asks for; a model that
    knows no device types is spread over the whole world. `one_copy` is the device type that would do that.

    Raises:
        ConfigurationError: the world cannot be divided into groups of that size.
    """
    if requested is not None:
        tp_size, wish = requested, f"--tp_size {requested}"
        if device_type_tp not in (None, requested):
            wish += f" (overrides {device_type}, which means {device_type_tp})"
    elif device_type_tp is not None:
        tp_size, wish = device_type_tp, f"--device_type {device_type}"
    else:
        tp_size, wish = world, "one copy of the model over all ranks, as no device type or --tp_size says otherwise"
    _require_divisible(world, tp_size, wish)
    warning = _whole_copies(world, one_copy) if tp_size == 1 < world and requested is None else ""
    return tp_size, f"tp {tp_size}: {wish}{warning}"


def _whole_copies(world: int, one_copy: str | None) -> str:
    """Say what several ranks mean for a device type of one card: who wants to divide the model is easily mistaken."""
    flag = f"--device_type {one_copy}" if one_copy else f"--tp_size {world}"
    return f"\nwarning: {world} whole copies of the model, one per rank; for one copy over {world} cards: {flag}"


def _require_divisible(world: int, tp_size: int, wish: str) -> None:
    if world % tp_size == 0:
        return
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    next_world = -(-world // tp_size) * tp_size
    raise ConfigurationError(
        f"{world} rank{'s' * (world > 1)} cannot form groups of {tp_size}",
        where=wish,
        why=f"{tp_size} ranks hold one copy of the model, so the number of ranks must be a multiple of {tp_size}",
        advice=f"torchrun --nproc_per_node {next_world}, or --tp_size {' or '.join(map(str, sizes))}",
    )
