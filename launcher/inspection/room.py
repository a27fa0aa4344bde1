"""Whether the disks have room for what a job writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.files.run_folder import STAGING
from quant_core.errors import EnvironmentFailure

# What is large of what a job leaves in its folders: calibration data, and shards, staged or published.
_LEFT = ("*.pth", "*.safetensors", f"{STAGING}/*.safetensors")


def still_needed(folder: Path, size: int) -> int:
    """Return the bytes that go into a folder, less those that an earlier run of the job may have left there."""
    return max(0, size - sum(path.stat().st_size for pattern in _LEFT for path in folder.glob(pattern)))


def by_disk(needed: Iterable[tuple[Path, int]]) -> list[dict[Path, int]]:
    """Return the bytes that go into folders that exist, one table for each disk."""
    disks: dict[int, dict[Path, int]] = {}
    for place, size in needed:
        disk = disks.setdefault(place.stat().st_dev, {})
        disk[place] = disk.get(place, 0) + size
    return list(disks.values())


def require_room(disk: Mapping[Path, int]) -> None:
    """Check that a disk has room for all that goes into its folders; raises EnvironmentFailure."""
    size, free = sum(disk.values()), shutil.disk_usage(next(iter(disk))).free
    if size > free:
        raise EnvironmentFailure(
            "the disk is too small for what the job writes",
            where=", ".join(map(str, disk)),
            why=f"it takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            advice="free space, or give folders on another disk",
        )
