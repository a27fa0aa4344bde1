"""What the runtime's loader demands of a file before it looks into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from quant_core.atomic_file import FILE_MODE
from quant_core.checkpoint.findings import Broken, Rule
from quant_core.checkpoint.tensor_parts import GB, index_path

_LARGEST = 100 * GB


def _is_a_file(path: Path) -> Iterator[Broken]:
    if index_path(path).exists() and not path.exists():
        yield Broken("", f"{path.name} is split into parts")
    elif path.is_symlink():
        yield Broken("", f"{path.name} is a link")
    elif not path.exists():
        yield Broken("", f"{path.name} is missing")
    elif not path.is_file():
        yield Broken("", f"{path.name} is no regular file")


def _mode(path: Path) -> Iterator[Broken]:
    mode = stat.S_IMODE(path.lstat().st_mode) if path.exists() and not path.is_symlink() else 0
    if mode & ~FILE_MODE:
        yield Broken("", f"{path.name} has the mode {mode:04o}")


def _owner(path: Path) -> Iterator[Broken]:
    if not path.exists():
        return
    status = path.lstat()
    if status.st_uid not in (0, os.geteuid()) and status.st_gid not in (os.getegid(), *os.getgroups()):
        yield Broken("", f"{path.name} belongs to user {status.st_uid} and group {status.st_gid}")


def _size(path: Path) -> Iterator[Broken]:
    if path.is_file() and path.stat().st_size > _LARGEST:
        yield Broken("", f"{path.name} has {path.stat().st_size / GB:.1f} GB")


FILE_RULES: tuple[Rule[Path], ...] = (
    Rule("one file", "the runtime reads one regular file of each kind for each rank", _is_a_file),
    Rule("mode", f"the loader refuses any bit that is not in {FILE_MODE:04o}, also for root (chmod 640)", _mode),
    Rule("owner", "the loader reads files of root, of its own user or of its own group", _owner),
    Rule("size", "the loader reads files of at most 100 GB", _size),
)
