"""A job that is asked to leave saves what it finished, says so by its status, and goes on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quant_core.calibration.records import load_dump
from tests.support.forked_ranks import run_forked
from tests.support.torchrun import start_launcher

pytestmark = pytest.mark.distributed

PROMPTS = 4  # of the prompt_file fixture
SOON_S = 20  # in which a crowded machine does what takes two seconds
STEPS = 6  # so that a batch takes long enough to be interrupted


def words(model: Path, prompts: Path, out: Path, *flags: object, steps: int = STEPS) -> list[str]:
    """Return the job of two ranks, without how its ranks are started."""
    words = (
        "flux", "--path", model, "--device", "cpu",
        "--device_type", "A2-32g-dual", "--prompt_path", prompts, "--width", "64", "--height", "64",
        "--infer_steps", steps, "--do_quant", "--quant_type", "w8a8_timestep",
        "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps", *flags,
    )  # fmt: skip
    return list(map(str, words))


def start(model: Path, prompts: Path, out: Path, *flags: object, steps: int = STEPS) -> subprocess.Popen[str]:
    """Start the two-rank job under the supervisor."""
    job = words(model, prompts, out, *flags, steps=steps)
    return start_launcher("--nproc_per_node", "2", *job, python_path=[out])


def go_on(model: Path, prompts: Path, out: Path, *flags: object) -> str:
    """Run the job again, to its end, and return what it printed."""
    again = run_forked(2, "-m", "launcher", *words(model, prompts, out, *flags))
    assert again.returncode == 0, again.stderr
    return again.stdout


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, as long as the job runs."""
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def status_of(out: Path) -> dict[str, object]:
    return json.loads((out / "weights" / "status.json").read_text())


def test_slurms_warning_stops_after_the_batch_whatever_follows_it_and_the_next_run_goes_on(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Slurm ends a step when its first host has ended: the others get a second signal, at any moment."""
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    part = tmp_path / "dumps" / ".calib_parts" / "calib_data_rank0" / "batch_00000.pth"
    wait_for(part.exists, job)
    job.send_signal(signal.SIGUSR1)
    wait_for(lambda: status_of(tmp_path)["state"] == "preempted", job)
    while job.poll() is None:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    output, _ = job.communicate()
    assert job.returncode == 75, output
    assert "stopped: SIGUSR1 asked the job to leave" in output
    assert status_of(tmp_path)["state"] == "preempted"
    saved = len(list(part.parent.glob("*.pth")))
    assert 1 <= saved < PROMPTS

    output = go_on(tiny_flux_folder, prompt_file, tmp_path)
    assert f"calibrate: {saved} of {PROMPTS} batches were finished by an earlier run" in output
    assert len(load_dump(tmp_path / "dumps" / "calib_data_rank0.pth")["records"]) == PROMPTS * STEPS
    assert not part.parent.exists()
    assert status_of(tmp_path)["state"] == "published"


def test_a_signal_to_one_of_two_copies_stops_both_and_both_go_on(tiny_flux_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"lighthouse number {n}\n" for n in range(12)))
    prompts.chmod(0o640)
    two_copies = ("--tp_size", "1")
    job = start(tiny_flux_folder, prompts, tmp_path, *two_copies)
    parts = [tmp_path / "dumps" / ".calib_parts" / f"calib_data_rank{rank}" for rank in range(2)]
    wait_for(lambda: all((part / "batch_00000.pth").exists() for part in parts), job)
    children = psutil.Process(job.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    saved = [len(list(part.glob("*.pth"))) for part in parts]
    assert all(1 <= count < 6 for count in saved)

    output = go_on(tiny_flux_folder, prompts, tmp_path, *two_copies)
    assert f"calibrate: {saved[0]} of 6 batches were finished by an earlier run" in output


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of the ranks."""
    return [child for child in psutil.Process(job.pid).children() if "RANK" in environ_of(child)]


def environ_of(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment, an empty one when it is gone."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
@pytest.mark.parametrize("moment", ["ranks are started", "rank 0 watches"])
def test_a_signal_while_the_job_starts_ends_it_soon(
    moment: str, number: signal.Signals, status: int, tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    has_come = {
        "ranks are started": lambda: len(ranks_of(job)) == 2,
        "rank 0 watches": (tmp_path / "weights" / "status.json").exists,
    }
    wait_for(has_come[moment], job)
    job.send_signal(number)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == status, output
    assert f"stopped: {number.name} asked the job to leave" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
def test_a_signal_that_meets_the_interpreters_of_the_ranks_ends_the_job_as_soon(
    number: signal.Signals, status: int, tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    # Interpreters read it before their program: the signal comes while they are in it.
    (tmp_path / "sitecustomize.py").write_text('import os, time\nif "RANK" in os.environ:\n    time.sleep(2)\n')
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    wait_for(lambda: len(ranks_of(job)) == 2, job)
    time.sleep(0.5)  # an interpreter takes a tenth of that to get there
    job.send_signal(number)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == status, output
    assert f"stopped: {number.name} asked the job to leave" in output
    assert "Traceback" not in output


def test_a_rank_that_dies_while_the_job_starts_is_the_cause(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    job = start(tiny_flux_folder, prompt_file, tmp_path)
    wait_for(lambda: len(ranks_of(job)) == 2, job)
    ranks_of(job)[1].kill()
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == 6, output
    assert "error: rank 1 was ended by SIGKILL" in output


def test_a_second_interrupt_leaves_at_once(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    # One batch takes much longer than is waited for here, so an orderly end would come too late.
    job = start(tiny_flux_folder, prompt_file, tmp_path, steps=2000)
    told = tmp_path / "weights" / "status.json"
    wait_for(lambda: told.exists() and "calibrate" in told.read_text(), job)
    ranks = ranks_of(job)
    job.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two interrupts that a person types are this far apart at least
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=SOON_S)
    assert job.returncode == 130, output
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert len(gone) == 2
