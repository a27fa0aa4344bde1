"""What keeps ranks from starting ends the job soon and in words: hosts that do not meet, signals meanwhile, flags."""

from __future__ import annotations

import json
import signal
import subprocess
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
