"""One job at a time works in a folder; who comes second is told who holds it, and a dead job keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from launcher.files.folder_lock import LOCK, hold
from quant_core.errors import EnvironmentFailure, FolderInUse

HOLD = """
import sys, time
from pathlib import Path
from launcher.files.folder_lock import hold
with hold(Path(sys.argv[1]), "--flag", "theirs"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_job_is_told_who_holds_the_folder_until_that_one_is_killed(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse) as raised, hold(tmp_path, "--flag", "mine"):
            pass
        assert f"process {other.pid} on {socket.gethostname()} has held it since 20" in raised.value.why
        assert f"--flag {tmp_path}" in raised.value.where
        other.kill()
    with hold(tmp_path, "--flag", "mine") as holds:
        assert holds


def test_ranks_of_one_job_on_other_hosts_keep_each_other_out_of_nothing(tmp_path: Path):
    with hold(tmp_path, "--flag", "mine"), hold(tmp_path, "--flag", "mine") as holds:
        assert not holds
    with hold(tmp_path, "--flag", "another") as holds:
        assert holds


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_no_job_from_working(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with hold(tmp_path, "--flag", "mine", said.append) as holds:
        assert not holds
    with hold(tmp_path, "--flag", "another", said.append) as holds:
        assert not holds
    assert len(said) == 2
    assert all(f"cannot be locked ([Errno {number}]" in line for line in said)


def test_the_note_of_a_killed_job_is_not_taken_for_that_of_the_job_that_has_just_come(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        killed.kill()
    note, stale, own = tmp_path / ".job.holder.json", tmp_path / "stale", tmp_path / "own"
    note.rename(stale)
    said: list[str] = []

    def come_second() -> None:
        with pytest.raises(FolderInUse) as raised, hold(tmp_path, "--flag", "second"):
            pass
        said.append(raised.value.why)

    with hold(tmp_path, "--flag", "first"):
        own.hardlink_to(note)
        stale.replace(note)  # as it is when the first job has the lock, and has not come to its note yet
        second = threading.Thread(target=come_second)
        second.start()
        time.sleep(0.3)
        own.replace(note)
        second.join()
    assert said[0].startswith(f"process {os.getpid()} on ")


NOBODY = 65534


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Return a folder of a group that both users are in."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    folder = Path(tempfile.mkdtemp())  # not below pytest's own folder, which is for one user
    shutil.chown(folder, group=NOBODY)
    folder.chmod(0o2770)
    yield folder
    shutil.rmtree(folder)


def as_nobody(folder: Path) -> str:
    """Return what another user of the folder's group gets from it, in a process of its own."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_hold_as_nobody, (folder,))


def _hold_as_nobody(folder: Path) -> str:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        with hold(folder, "--flag", "another") as holds:
            return f"holds: {holds}"
    except (FolderInUse, EnvironmentFailure) as error:
        return type(error).__name__


def test_two_users_of_a_shared_folder_keep_each_other_out(shared_folder: Path):
    with hold(shared_folder, "--flag", "mine"):
        assert as_nobody(shared_folder) == "FolderInUse"
    assert as_nobody(shared_folder) == "holds: True"


def test_a_lock_that_another_user_may_not_even_read_is_refused(shared_folder: Path):
    (shared_folder / LOCK).touch(mode=0o600)
    assert as_nobody(shared_folder) == "EnvironmentFailure"
