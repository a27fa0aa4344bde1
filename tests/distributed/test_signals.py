"""A job that is asked to leave saves what it finished, says so by its status, and goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torchrun import ROOT

from quant_core.calibration.records import load_dump

pytestmark = pytest.mark.distributed

PROMPTS = 4  # of the prompt_file fixture
STEPS = 6  # so that a batch takes long enough to be interrupted


def start(model: Path, prompts: Path, out: Path) -> subprocess.Popen[str]:
    """Start the two-rank job under the supervisor."""
    words = [
        sys.executable, "-m", "launcher", "--nproc_per_node", "2", "flux", "--path", model, "--device", "cpu",
        "--device_type", "A2-32g-dual", "--prompt_path", prompts, "--width", "64", "--height", "64",
        "--infer_steps", STEPS, "--do_quant", "--quant_type", "w8a8_timestep",
        "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps",
    ]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, words)), cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, as long as the job runs."""
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def status_of(out: Path) -> dict[str, object]:
    return json.loads((out / "weights" / "status.json").read_text())


def test_slurms_warning_stops_after_the_batch_and_the_next_run_goes_on(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    part = tmp_path / "dumps" / ".calib_parts" / "calib_data_rank0" / "batch_00000.pth"
    wait_for(part.exists, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    assert "stopped: SIGUSR1 asked the job to leave" in output
    assert status_of(tmp_path)["state"] == "preempted"
    saved = len(list(part.parent.glob("*.pth")))
    assert 1 <= saved < PROMPTS

    again = start(tiny_flux_folder, prompt_file, tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert f"calibrate: {saved} of {PROMPTS} batches were finished by an earlier run" in output
    assert len(load_dump(tmp_path / "dumps" / "calib_data_rank0.pth")["records"]) == PROMPTS * STEPS
    assert not part.parent.exists()
    assert status_of(tmp_path)["state"] == "published"


def test_a_second_interrupt_leaves_at_once(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    wait_for((tmp_path / "weights" / "status.json").exists, job)
    ranks = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two interrupts that a person types are this far apart at least
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 130, output
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert len(gone) >= 2
