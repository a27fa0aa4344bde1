"""Make files cold before they are read: what a first run sees, and the only state that two runs can share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")


def drop(folders: Iterable[Path]) -> str:
    """Take the files of the folders out of the page cache; returns how: all of it as root, else file by file."""
    os.sync()  # only pages that are on the disk can be dropped
    try:
        _DROP.write_text("1")
        return "page cache dropped"
    except OSError:
        for folder in folders:
            for path in folder.rglob("*"):
                if path.is_file():
                    _advise(path)
        return "files advised out of the page cache"


def _advise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
