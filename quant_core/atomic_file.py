"""Publish a file whole or not at all.

How: the content goes to a temporary name in the same folder, is flushed to the disk, gets its final mode, and is then
renamed over the final name; last, the folder itself is flushed, so that the rename survives a power cut. A rename
inside one file system is atomic: a reader sees the old file or the new one. What it gives up: for a moment both exist,
so the folder needs room for two.

Worked example: a rank is killed while it writes 7 GB. Under the final name there is still nothing (or the last good
file); beside it lies `.<name>.<pid>.tmp`, which the next run's `sweep` removes, because no complete file ever has
that form of name (a user's `.notes.tmp` has another).

Modes are set explicitly, whatever the umask: files 0640 and folders 0750, the widest that the consumer accepts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

FILE_MODE = 0o640
FOLDER_MODE = 0o750
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a temporary path, then publish what it wrote under `path`. Returns `path`."""
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.chmod(temporary, FILE_MODE)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)
    return path


def write_text_atomically(path: Path, text: str) -> Path:
    """Publish `text` as UTF-8 under `path`."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_folder(folder: Path) -> Path:
    """Create the folder and its missing parents with mode 0750; folders that exist keep their mode."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(FOLDER_MODE)
    return folder


def sweep(folder: Path) -> list[Path]:
    """Remove temporaries that killed runs left in the folder, and return their paths; this process's own stay.

    Only for whoever keeps other writers out of the folder: theirs cannot be told from those of the dead.
    """
    mine, found = f".{os.getpid()}.tmp", folder.glob(".*.tmp") if folder.is_dir() else ()
    stale = [p for p in found if _TEMPORARY.fullmatch(p.name) and p.is_file() and not p.name.endswith(mine)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
