"""One job at a time works in a folder; who comes second is told who holds it, and a dead job keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.files.folder_lock import hold
from quant_core.errors import FolderInUse

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
