"""Losing the terminal is not losing the job: whatever becomes of its reader, it goes on, and ends as it would."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from tests.support.forked_ranks import start_forked
from tests.support.torchrun import ROOT

pytestmark = pytest.mark.distributed

SOON_S = 40  # in which a crowded machine does what takes a few seconds
LONG = 2000  # steps that take much longer than anything here


def words(model: Path, prompts: Path, out: Path, *, ranks: int = 1, steps: int = 2) -> list[str]:
    """Return a job in one process, or in two under the supervisor."""
    several = ["--nproc_per_node", "2"] if ranks > 1 else []
    return [
        sys.executable, "-m", "launcher", *several, "flux", "--path", str(model), "--device", "cpu",
        "--device_type", "A2-32g-dual" if ranks > 1 else "A2-64g", "--prompt_path", str(prompts), "--width", "64",
        "--height", "64", "--infer_steps", str(steps), "--do_quant", "--quant_weight_save_folder",
        str(out / "weights"), "--quant_dump_calib_folder", str(out / "dumps"),
    ]  # fmt: skip


def start(command: list[str], terminal: int) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)


def full_pipe() -> tuple[int, int]:
    """Return a pipe that nobody reads, with not a byte free."""
    readable, writable = os.pipe()
    fill(writable)
    return readable, writable


def fill(writable: int) -> None:
    """Leave not a byte free in a pipe."""
    os.set_blocking(writable, False)
    try:
        while True:
            os.write(writable, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writable, True)


def status_of(out: Path) -> dict[str, object]:
    path = out / "weights" / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_for(happened: Callable[[], bool], job: subprocess.Popen[bytes]) -> None:
    while not happened():
        assert job.poll() is None
        time.sleep(0.02)


def ranks_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return sorted(psutil.Process(job.pid).children(), key=lambda child: child.environ().get("RANK", ""))


def calibrates(out: Path) -> bool:
    return "calibrate" in json.dumps(status_of(out))


def forked(job: list[str], terminal: Path) -> ForkServerProcess:
    """Run a job in one process that is forked: what it prints into is its own, however it was started."""
    return start_forked(*job[1:], terminal=terminal)


def ends(terminal: str, folder: Path) -> tuple[int, int, Path]:
    """Return the reader's and the writer's end of a pipe or a terminal, and the name by which others write into it."""
    if "terminal" in terminal:
        reader, writer = pty.openpty()
        return reader, writer, Path(os.ttyname(writer))
    name = folder / "pipe"
    os.mkfifo(name)
    reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    return reader, os.open(name, os.O_WRONLY), name


@pytest.mark.parametrize("terminal", ["pipe whose reader dies", "terminal that vanishes"])
def test_a_job_goes_on_when_nobody_is_left_to_read_it(
    terminal: str, tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    reader, writer, name = ends(terminal, tmp_path)
    job = forked(words(tiny_flux_folder, prompt_file, tmp_path), name)
    assert os.read(reader, 1)  # it has begun to speak
    os.close(reader)
    os.close(writer)
    job.join(timeout=120)
    assert job.exitcode == 0
    assert status_of(tmp_path)["state"] == "published"


def test_a_job_goes_on_when_its_reader_stops_reading(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    _reader, writer, name = ends("pipe", tmp_path)
    fill(writer)
    job = forked(words(tiny_flux_folder, prompt_file, tmp_path), name)
    job.join(timeout=120)
    assert job.exitcode == 0
    assert status_of(tmp_path)["state"] == "published"


def test_a_job_runs_with_its_outputs_closed_and_prints_into_none_of_its_files(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words(tiny_flux_folder, prompt_file, tmp_path)]
    assert start(closed, subprocess.DEVNULL).wait(timeout=120) == 0
    assert status_of(tmp_path)["state"] == "published"


def test_a_second_interrupt_ends_a_job_whose_reader_stopped_reading(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    _reader, writer = full_pipe()
    job = start(words(tiny_flux_folder, prompt_file, tmp_path, ranks=2, steps=LONG), writer)
    os.close(writer)
    wait_for(lambda: calibrates(tmp_path), job)
    ranks = ranks_of(job)
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two interrupts that a person types are this far apart
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=SOON_S) == 130
    assert status_of(tmp_path)["state"] == "interrupted"
    assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_a_killed_rank_ends_a_job_whose_reader_is_gone(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    job = start(words(tiny_flux_folder, prompt_file, tmp_path, ranks=2, steps=LONG), writer)
    os.close(writer)
    wait_for(lambda: calibrates(tmp_path), job)
    os.close(reader)
    ranks = ranks_of(job)
    ranks[1].kill()
    assert job.wait(timeout=SOON_S) == 6
    assert status_of(tmp_path)["state"] == "failed"
    assert not psutil.wait_procs(ranks, timeout=5)[1]
