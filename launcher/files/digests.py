"""Know content by its sha256, and a file without reading it twice.

Reading a model of 24 GB takes half a minute, and every run asks what it holds. So the digest of a file is remembered
in the user's cache folder, together with all that the file's status says about its content: size, times, inode. While
these are the same, the file is not read again. Each remembered digest is a small file of its own that is replaced
whole, so ranks and jobs may write at the same time and never undo each other.

What it gives up: bits that a disk changes by itself leave the status as it was; they are noticed by whoever reads the
file, not here. And a clock has grains: a file that changed a moment ago could change once more within the same grain,
so its digest is not remembered yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from model_adapters.weights.passing_read import PassingRead
from quant_core.atomic_file import write_text_atomically
from quant_core.tensor_bytes import digest_of_tensor

# Longer than a grain of the clocks that local and network file systems put into a file's status.
_GRAIN_S = 0.1


def digest_of_text(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_records(records: Sequence[Any]) -> str:
    """Return the sha256 of calibration records: plain data in which each different tensor may stand many times."""
    known: dict[int, str] = {}

    def plain(value: Any) -> Any:
        """Return the value with the digest of each tensor in its place."""
        if isinstance(value, Tensor):
            # All records are held, so no two different tensors have had one identity.
            if id(value) not in known:
                known[id(value)] = digest_of_tensor(value)
            return {"tensor": known[id(value)]}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return digest_of_text(json.dumps(plain(records)))


def digest_of_file(path: Path, *, fresh: bool = False, passing: bool = False) -> str:
    """Return the sha256 of a file's content; it is read only if it may have changed since, or if it has to be fresh.

    passing: there is no room in memory to keep what is read.
    """
    status = _status(path)
    if not fresh and (known := _recall(path, status)) is not None:
        return known
    began = time.time_ns()
    digest = _read(path, PassingRead() if passing else None)
    if _status(path) == status and began - max(status["modified"], status["changed"]) > _GRAIN_S * 1e9:
        _remember(path, status, digest)
    return digest


def remember(path: Path, digest: str) -> None:
    """Note the sha256 of a file that this process has just written, unless a change could hide in a grain still."""
    status = _status(path)
    if time.time_ns() - status["modified"] > _GRAIN_S * 1e9:
        _remember(path, status, digest)


def move(path: Path, target: Path) -> None:
    """Rename a file; what is known of its content stays known.

    A later change cannot hide in the same grain of the clock: the time of modification stays the old one by renaming,
    and a change would move it.
    """
    known = _recall(path, _status(path))
    os.replace(path, target)
    if known is not None:
        _remember(target, _status(target), known)


def _read(path: Path, passing: PassingRead | None) -> str:
    digest, memory, place = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(memory):
            digest.update(memory[:count])
            if passing:
                passing.note(path, place, place + count)
            place += count
    return digest.hexdigest()


def _status(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "size": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,  # also when a program puts the time of modification back
        "inode": found.st_ino,
    }


def _recall(path: Path, status: dict[str, int]) -> str | None:
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        remembered = json.loads(_memory_of(path).read_text(encoding="utf-8"))
        if remembered["status"] == status and remembered["path"] == str(path.resolve()):
            return str(remembered["sha256"])
    return None


def _remember(path: Path, status: dict[str, int], digest: str) -> None:
    remembered = {"path": str(path.resolve()), "status": status, "sha256": digest}
    with suppress(OSError, RuntimeError):  # no home, or none that may be written: the file is read again next time
        write_text_atomically(_memory_of(path), json.dumps(remembered) + "\n")


def _memory_of(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "dit-quant-launcher" / "digests" / f"{digest_of_text(str(path.resolve()))}.json"
