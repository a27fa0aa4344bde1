"""What keeps ranks from starting ends the job soon and in words: hosts that do not meet, signals meanwhile, flags."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.torchrun import free_port, start_launcher

pytestmark = pytest.mark.distributed

SOON_S = 20  # in which a crowded machine does what takes a few seconds


def start(out: Path, *flags: object) -> subprocess.Popen[str]:
    """Start a job of two hosts on this one of them; PORT in a flag is one that nobody listens on."""
    port = str(free_port())
    return start_launcher(
        "--nnodes", 2, "--nproc_per_node", 1, *(str(flag).replace("PORT", port) for flag in flags),
        "flux", "--path", out, "--device", "cpu", "--do_save_img", "--save_path", out / "images",
    )  # fmt: skip


def fixed_place(host: int) -> list[object]:
    """Return flags for a host that meets the other at an address that both know."""
    return ["--master_addr", "127.0.0.1", "--master_port", "PORT", "--node_rank", host]


ANY_HOSTS = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:PORT"]


@pytest.mark.parametrize(
    ("flags", "number", "status"),
    [
        (fixed_place(0), signal.SIGINT, 130),
        (fixed_place(1), signal.SIGTERM, 75),
        (ANY_HOSTS, signal.SIGTERM, 75),
    ],
    ids=["the first", "the second", "one of any"],
)
def test_a_signal_ends_a_host_that_waits_for_another(
    flags: list[object], number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    job = start(tmp_path, *flags)
    while not list(tmp_path.glob("launcher_*")):  # the last thing that shows before it waits, which takes minutes
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    time.sleep(1)
    job.send_signal(number)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == status, output
    assert f"stopped: {number.name} asked the job to leave" in output
    assert json.loads((tmp_path / "images" / "status.json").read_text())["exit_code"] == status
    assert not list(tmp_path.glob("launcher_*"))


@pytest.mark.parametrize(
    "flags",
    [
        [*fixed_place(0), "--rdzv_conf", "timeout=2"],
        [*fixed_place(1), "--rdzv_conf", "timeout=2"],
        [*ANY_HOSTS, "--rdzv_conf", "join_timeout=2"],
    ],
    ids=["the other never comes", "the first is not there", "a meeting of any hosts"],
)
def test_hosts_that_do_not_meet_are_said_to(flags: list[object], tmp_path: Path) -> None:
    job = start(tmp_path, *flags)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 6, output
    assert "error: the hosts of --nnodes 2 do not find each other\n  where  127.0.0.1:" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "images" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([*fixed_place(0), "--rdzv_conf", "timeout=soon"], "'soon'"),
        (["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:99999999"], "must be an integer between 0 and 65536"),
        (["--rdzv_backend", "pigeon"], "pigeon"),
    ],
    ids=["timeout", "port", "backend"],
)
def test_flags_of_torchrun_that_make_no_sense_are_explained(flags: list[object], says: str, tmp_path: Path) -> None:
    job = start(tmp_path, *flags)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2, output
    assert "error: torchrun cannot start ranks with these flags" in output
    assert says in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_a_dry_run_that_finds_a_problem_writes_nothing_into_the_folder_of_a_job(tmp_path: Path) -> None:
    job = start_launcher(
        "--nproc_per_node", 1, "flux", "--path", tmp_path / "model", "--device", "cpu", "--do_save_img",
        "--save_path", tmp_path / "images", "--dry_run",
    )  # fmt: skip
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0, output
    assert "error: " in output
    assert not list(tmp_path.iterdir())


SLOW_RANK = """
import os, signal, sys, time
from pathlib import Path
from launcher.failure.error_file import write_error_file
from launcher.failure.record import Failure
from launcher.failure.signals import stopped_on

def leave(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write_error_file(Failure.of(stopped_on("SIGTERM"), 0), is_first=True)
    Path(FOLDER, "noted").touch()
    time.sleep(0.2)
    print("last words", flush=True)
    os._exit(75)

signal.signal(signal.SIGTERM, leave)
Path(FOLDER, "ready").touch()
time.sleep(60)
"""
SUPERVISE = """
import sys
from launcher.start.supervisor import supervise
sys.exit(supervise(sys.argv[2:], sys.argv[1:2]))
"""


# The first rank takes long to finish what it does, and the second notices when it is gone.
PATIENCE_OVER = """
import os, signal, sys, time
from pathlib import Path
from launcher.failure.error_file import write_error_file
from launcher.failure.record import Failure
from quant_core.errors import DistributedError

rank = int(os.environ["RANK"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(FOLDER, f"pid{rank}").write_text(str(os.getpid()))
Path(FOLDER, f"pid{rank}").rename(Path(FOLDER, f"ready{rank}"))
if rank == 0:
    time.sleep(60)
while not Path(FOLDER, "ready0").exists():
    time.sleep(0.01)
first = int(Path(FOLDER, "ready0").read_text())
while Path(f"/proc/{first}").exists() and "Z" not in Path(f"/proc/{first}/stat").read_text().split()[2]:
    time.sleep(0.001)
write_error_file(Failure.of(DistributedError("rank 0 vanished", where="", why="", advice=""), 1), is_first=True)
os._exit(6)
"""


def test_a_rank_that_was_asked_to_stop_and_takes_too_long_ends_a_job_that_goes_on_later(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(PATIENCE_OVER.replace("FOLDER", repr(str(tmp_path))))
    images = ["flux", "--path", str(tmp_path), "--device", "cpu", "--do_save_img", "--save_path", str(tmp_path / "out")]
    flags = ["--nproc_per_node", "2", "--shutdown-timeout", "1"]
    job = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(rank), *flags, *images],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for name in ("ready0", "ready1"):
        while not (tmp_path / name).exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == 75, output
    assert "stopped: SIGTERM asked the job to leave" in output


def test_signal_upon_signal_cuts_off_no_rank_that_is_saying_why_it_leaves(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(SLOW_RANK.replace("FOLDER", repr(str(tmp_path))))
    images = ["flux", "--path", str(tmp_path), "--device", "cpu", "--do_save_img", "--save_path", str(tmp_path / "out")]
    job = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(rank), "--nproc_per_node", "1", *images],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for name in ("ready", "noted"):
        while not (tmp_path / name).exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
    while job.poll() is None:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == 75, output
    assert "last words" in output
