"""Keep each finished batch of a calibration on disk, so that an interrupted job goes on after the last one.

How: after a batch its records are published as one small dump in a hidden folder beside the final one. When all
batches are there, the final dump is assembled *from the parts*, also in a run that nothing interrupted: both ways lead
through the same files, so a resumed dump is byte-identical by construction.

Assembling loads the parts, makes equal tensors one object and equal texts one object, in order. `torch.save` writes an
object once and refers to it afterwards, so the bytes depend on which objects are the same; who made them, and in how
many runs, is forgotten.

Worked example: 24 prompts, killed in the 17th. The ranks of one copy find 16, 16, 15 and 16 parts, agree on 15, and
run prompts 16 to 24. What it costs: the dump is written twice, a few hundred megabytes for an hour of calibration.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.files.digests import digest_of_records
from quant_core.atomic_file import make_folder
from quant_core.calibration.records import load_dump, save_dump
from quant_core.errors import InputError
from quant_core.tensor_bytes import digest_of_tensor

FOLDER = ".calib_parts"
# Where a header has the digest of the records that it belongs to.
DIGEST = "sha256"


@dataclass(frozen=True)
class CalibrationParts:
    """The finished batches of one rank's calibration; `fingerprint` tells whose they are."""

    folder: Path
    fingerprint: str

    @classmethod
    def beside(cls, dump: Path, fingerprint: str) -> CalibrationParts:
        """Return the parts that belong to a dump."""
        return cls(dump.parent / FOLDER / dump.stem, fingerprint)

    def finished(self) -> int:
        """Return how many batches, counted from the first, are complete and of this job."""
        count = 0
        while self._is_whole(count):
            count += 1
        return count

    def save(self, batch: int, records: list[Any]) -> Path:
        """Publish the records of one batch."""
        make_folder(self.folder)
        header = {"fingerprint": self.fingerprint, "batch": batch, DIGEST: digest_of_records(records)}
        return save_dump(self._path(batch), records, header)

    def assemble(self, dump: Path, batches: int, header: Mapping[str, Any]) -> int:
        """Publish the whole dump from its parts and remove them; returns the number of records.

        Raises InputError when a part is missing, damaged or another job's, or when no batch captured anything.
        """
        unique = _Unique()
        records = [unique(entry) for batch in range(batches) for entry in self.read(batch)]
        if not records:
            raise InputError(
                "nothing was captured",
                where=str(dump),
                why="the pipeline ran without calling the transformer",
                advice="run it on at least one prompt and one step",
            )
        save_dump(dump, records, {**header, DIGEST: digest_of_records(records)})
        self.discard()
        return len(records)

    def whole(self) -> list[int]:
        """Return the numbers of all complete batches of this job."""
        found = (re.fullmatch(r"batch_(\d+)\.pth", path.name) for path in sorted(self.folder.glob("batch_*.pth")))
        return [int(name[1]) for name in found if name and self._is_whole(int(name[1]))]

    def forget(self, batch: int) -> None:
        """Remove a batch, if it is there."""
        self._path(batch).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all parts of this rank."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:05d}.pth"

    def _is_whole(self, batch: int) -> bool:
        if not self._path(batch).exists():
            return False
        try:
            self.read(batch)
        except InputError:
            return False  # of another job or version, or damaged: the batch is run again
        return True

    def read(self, batch: int) -> list[Any]:
        """Return the records of a batch. Raises InputError when it is missing, damaged or another job's."""
        path = self._path(batch)
        part = load_sound_dump(path)
        header = part["header"]
        if (header.get("fingerprint"), header.get("batch")) != (self.fingerprint, batch):
            raise InputError(
                "a finished batch is another job's",
                where=str(path),
                why="a job with other options wrote into the folder of this one",
                advice="give each job its own --quant_dump_calib_folder, and run this one again",
            )
        return part["records"]


def discard_strangers(folder: Path, files: Iterable[Path]) -> None:
    """Remove parts beside the dumps in a folder that belong to none of a job's files: a rank of theirs is no more."""
    known = {file.stem for file in files}
    for parts in (folder / FOLDER).glob("calib_*"):
        if parts.name not in known:
            shutil.rmtree(parts, ignore_errors=True)


def load_sound_dump(path: Path) -> dict[str, Any]:
    """Load a dump, tensors mapped from the file, and check that its records are those that were saved.

    Raises InputError when it is unreadable, of another format or version, incomplete, or damaged.
    """
    dump = load_dump(path)
    if digest_of_records(dump["records"]) != dump["header"].get(DIGEST):
        raise InputError(
            "the calibration data was changed after it was saved",
            where=str(path),
            why="its records do not have the digest that stands in its header",
            advice="remove the file and run the job again; and have the disk looked at",
        )
    return dump


@dataclass
class _Unique:
    """Rebuild plain data so that equal tensors and equal texts are one object each."""

    _tensors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensors.setdefault(digest_of_tensor(value), value)
        if isinstance(value, str):
            return sys.intern(value)
        if isinstance(value, dict):
            return {sys.intern(key): self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        return value
