"""The names of all files that a run reads and writes, in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.ranks.mesh import Mesh
from quant_core.checkpoint.entries import CheckpointFiles, description_file_name, weight_file_name

MANIFEST = "quant_manifest.json"
_CALLS, _RANGES = "calib_data", "calib_ranges"
# The resolved options of the job, which `--config` accepts.
CONFIG = "quant_job.yaml"
# What was chosen for each layer and why, which `--layer_schemes @FILE` accepts.
DECISIONS = "quant_decisions.yaml"
# What outlier suppression made of the channels of its inputs, for a report.
SMOOTHED = "quant_smoothed_inputs.json"
# A folder of its own inside the output folder: on the same file system, so that publishing is a rename.
STAGING = ".shards"
# What an evaluation finds, in a folder of its own too.
QUALITY = "quality"
# What `report` makes of all that: pages, and their data.
PAGES, DATA = ("report.html", "report.md"), "report.json"
REPORT = (*PAGES, DATA)


@dataclass(frozen=True)
class RunFolder:
    """Name the files of one rank's part of a run.

    `scheme` is the checkpoint's type in lower case (`w8a8_dynamic` also for FA3 and smoothing). Dumps carry the global
    rank, shards the tensor-parallel rank; in a single process neither has a suffix.
    """

    weights: Path
    dumps: Path
    scheme: str
    mesh: Mesh
    is_distributed: bool

    @property
    def manifest(self) -> Path:
        """The file whose presence says that a checkpoint is whole."""
        return self.weights / MANIFEST

    @property
    def staging(self) -> Path:
        """Where shards wait until all of them have been checked."""
        return self.weights / STAGING

    def dump(self) -> Path:
        """This rank's calibration data."""
        return self._of_rank(_CALLS)

    def ranges(self) -> Path:
        """What this rank measured while it calibrated, with --calibrate online."""
        return self._of_rank(_RANGES)

    def shard(self, tp_rank: int | None = None) -> CheckpointFiles:
        """The published files of a tensor-parallel rank, this one's by default."""
        return shard_files(self.weights, self.scheme, self._suffix(tp_rank))

    def staged(self, tp_rank: int | None = None) -> CheckpointFiles:
        """The same files before they are published."""
        return shard_files(self.staging, self.scheme, self._suffix(tp_rank))

    def note(self, tp_rank: int | None = None) -> Path:
        """What a rank notes about the shard it staged."""
        return note_file(self.staging, self.scheme, self._suffix(tp_rank))

    def calibrations(self) -> list[Path]:
        """What all ranks write into the folder of the calibration data."""
        return [self._of_rank(stem, rank) for stem in (_CALLS, _RANGES) for rank in range(self.mesh.world)]

    def _of_rank(self, stem: str, rank: int | None = None) -> Path:
        number = self.mesh.rank if rank is None else rank
        return self.dumps / f"{stem}{f'_rank{number}' if self.is_distributed else ''}.pth"

    def _suffix(self, tp_rank: int | None) -> str:
        return tp_suffix(self.mesh.tp_rank if tp_rank is None else tp_rank, self.mesh.tp_size)


def tp_suffix(tp_rank: int, tp_size: int) -> str:
    """Return what the loader puts before the extension: nothing for an undivided model."""
    return f"_{tp_rank}" if tp_size > 1 else ""


def shard_files(folder: Path, scheme: str, suffix: str) -> CheckpointFiles:
    """Return the two files of one shard."""
    return CheckpointFiles(
        folder / f"{weight_file_name(scheme)}{suffix}.safetensors",
        folder / f"{description_file_name(scheme)}{suffix}.json",
    )


def staged_files(staging: Path, scheme: str) -> Iterator[Path]:
    """Yield every file that shards of a type have in the staging folder, of jobs on any number of ranks."""
    stems = f"{weight_file_name(scheme)}|{description_file_name(scheme)}|{_note_name(scheme)}"
    for path in sorted(staging.iterdir()):
        if re.fullmatch(rf"({stems})(_\d+)?\.(safetensors|json)", path.name):
            yield path


def note_file(folder: Path, scheme: str, suffix: str) -> Path:
    """Return the note that belongs to a staged shard."""
    return folder / f"{_note_name(scheme)}{suffix}.json"


def _note_name(scheme: str) -> str:
    return f"quant_shard_note_{scheme}"
