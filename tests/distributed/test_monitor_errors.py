"""A monitor that meets an error of its own goes on, or says so: a rank that is well is never taken for dead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked_ranks import run_forked
from tests.support.torchrun import start_launcher

pytestmark = pytest.mark.distributed

# What runs before the launcher, in an interpreter that starts (sitecustomize) or in a forked one. What the monitor asks
# for its own memory fails on rank 1, some times.
FAILS = """import os
if os.environ.get("RANK") == "1":
    import psutil, threading
    times, ask = [], psutil.Process.memory_info
    def memory_info(self):
        if threading.current_thread().name == "monitor":
            times.append(1)
            if len(times) <= TIMES:
                raise ZeroDivisionError("injected")
        return ask(self)
    psutil.Process.memory_info = memory_info
"""


def words(model: Path, prompts: Path, out: Path) -> list[str]:
    """Return the job of two ranks, without how its ranks are started."""
    words = (
        "flux", "--path", model, "--device", "cpu", "--device_type", "A2-32g-dual",
        "--prompt_path", prompts, "--width", "64", "--height", "64", "--infer_steps", "8", "--do_quant",
        "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps",
    )  # fmt: skip
    return list(map(str, words))


def assert_noted(out: Path) -> None:
    """Check that rank 1 wrote down what its monitor met."""
    log = [json.loads(line) for line in (out / "weights" / "logs" / "rank1.jsonl").read_text().splitlines()]
    assert any(entry["text"] == "the monitor could not look" and "injected" in entry["traceback"] for entry in log)


def test_an_error_of_the_monitor_that_passes_is_survived(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    launches = 'import runpy\nrunpy.run_module("launcher", run_name="__main__", alter_sys=True)\n'
    (program := tmp_path / "launcher_that_fails.py").write_text(FAILS.replace("TIMES", "2") + launches)
    done = run_forked(2, program, *words(tiny_flux_folder, prompt_file, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_noted(tmp_path)


def test_an_error_of_the_monitor_that_stays_is_told_by_the_rank_that_has_it(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS.replace("TIMES", str(10**6)))
    job = start_launcher(
        "--nproc_per_node", "2", *words(tiny_flux_folder, prompt_file, tmp_path), python_path=[tmp_path]
    )
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1, output
    assert_noted(tmp_path)
    assert "error: ZeroDivisionError: injected\n  where  rank 1, " in output


# A job that fails while its monitor writes the status: the disk takes SECONDS to flush what the monitor wrote, and then
# 1.5 s to flush the folder, after the file that tells the end was renamed.
FAILS_MEANWHILE = """import os, threading, time
from launcher.config.job_config import JobConfig, Output, RankOptions
from launcher.failure.monitor import Monitor
from model_adapters import load_adapter
from quant_core.errors import InputError

flush, writes, of_main = os.fsync, threading.Event(), []
def fsync(descriptor):
    if threading.current_thread().name == "monitor":
        writes.set()
        time.sleep(SECONDS)
    elif writes.is_set():
        of_main.append(descriptor)
        if len(of_main) == 2:
            time.sleep(1.5)
    flush(descriptor)
os.fsync = fsync

options = load_adapter("flux").options(path="flux", device_type="A2-64g")
output = Output(save_path="FOLDER")
watch = Monitor(JobConfig(model="flux", pipeline=options, ranks=RankOptions(device="cpu"), output=output))
watch.start()
assert writes.wait(60)
watch.fail(InputError("the prompts cannot be read"))
"""


@pytest.mark.parametrize("seconds", [1, 60])
def test_a_job_that_fails_while_its_status_is_written_has_failed_in_it_and_leaves(tmp_path: Path, seconds: int) -> None:
    program = FAILS_MEANWHILE.replace("SECONDS", str(seconds)).replace("FOLDER", str(tmp_path / "out"))
    (path := tmp_path / "fails_meanwhile.py").write_text(program)
    done = run_forked(1, path, timeout_s=40)
    assert done.returncode == 4, done.stderr
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"
