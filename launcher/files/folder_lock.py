"""Keep a folder for one job at a time.

How: the operating system's lock on a hidden file in the folder. It is gone with the process that holds it, however
that ends, so the file that a dead job leaves keeps nobody out. A note beside it says who holds the lock, and is locked
as long: a note that is not locked is a dead job's.

What it gives up: a file system may know no locks. Then the job says so and goes on: digests still tell its files from
another job's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.journal.status import format_time
from quant_core.atomic_file import FILE_MODE, write_text_atomically
from quant_core.errors import EnvironmentFailure, FolderInUse

LOCK = ".job.lock"
_NOTE = ".job.holder.json"
# Who holds a lock writes its note at once; on a network file system that takes a moment.
_PATIENCE_S = 2.0
# How a file system says that it knows no locks, or that nobody can write there anyway.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS)


class Holder(BaseModel):
    """Say which process holds a folder, since when, and for which job: ranks on several hosts may be of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    host: str
    pid: int
    since: str


@contextmanager
def hold(folder: Path, option: str, job: str, say: Callable[[str], object] = print) -> Iterator[bool]:
    """Keep other jobs out of a folder for as long as the context lasts; yields whether this process holds it.

    option: what chose the folder, as a user calls it. job: a name that the job's ranks, and no other's, share.

    Raises FolderInUse, at once, when another job holds it; EnvironmentFailure when nobody can know.
    """
    try:
        lock = _lock(folder / LOCK)
    except BlockingIOError:
        if (holder := _holder(folder)) and holder.job == job:
            yield False
            return
        raise _in_use(folder, option, holder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unknown(folder, option, error) from error
        say(f"{option}: {folder} cannot be locked ({error}): see to it that no other job uses it")
        yield False
        return
    try:
        me = Holder(job=job, host=socket.gethostname(), pid=os.getpid(), since=format_time(time.time()))
        note = _lock(write_text_atomically(folder / _NOTE, me.model_dump_json() + "\n"), patiently=True)
        try:
            yield True
        finally:
            (folder / _NOTE).unlink(missing_ok=True)
            os.close(note)
    finally:
        os.close(lock)


def _lock(path: Path, *, patiently: bool = False) -> int:
    """Return the descriptor that holds the lock until it is closed; raises BlockingIOError when another one does.

    patiently: wait for the other one instead.
    """
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if patiently else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)  # another user's: who may read a file may lock it, but on NFS
    with suppress(PermissionError):  # not its owner
        os.fchmod(descriptor, FILE_MODE)  # whatever the umask: the others of a group need to read it
    return descriptor


def _holder(folder: Path) -> Holder | None:
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            with (folder / _NOTE).open(encoding="utf-8") as note:
                if _is_locked(note.fileno()):
                    return Holder.model_validate_json(note.read())
        except (OSError, UnicodeDecodeError, ValidationError):
            pass
        time.sleep(_PATIENCE_S / 20)
    return None


def _is_locked(descriptor: int) -> bool:
    """Tell whether another one holds the lock; reading is enough to ask, on NFS too, for a lock that is shared."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _unknown(folder: Path, option: str, error: OSError) -> EnvironmentFailure:
    return EnvironmentFailure(
        "nobody can tell whether another job works in this folder",
        where=f"{option} {folder}",
        why=f"{folder / LOCK} cannot be locked: {error.strerror or error}",
        advice=f"see that this user may write into the folder and read that file, or give another {option}",
    )


def _in_use(folder: Path, option: str, holder: Holder | None) -> FolderInUse:
    who = f"process {holder.pid} on {holder.host} has held it since {holder.since}" if holder else "it is locked"
    is_far = holder is None or holder.host != socket.gethostname()
    gone = f"; if no such process is left there, remove {folder / LOCK}" if is_far else ""
    return FolderInUse(
        "another job works in this folder",
        where=f"{option} {folder}",
        why=who,
        advice=f"wait until that job has ended, or give this one another {option}{gone}",
    )
