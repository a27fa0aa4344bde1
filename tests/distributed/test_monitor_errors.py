"""A monitor that meets an error of its own goes on, or says so: a rank that is well is never taken for dead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.torchrun import start_launcher

pytestmark = pytest.mark.distributed

# Interpreters read it before their program. What the monitor asks for its own memory fails on rank 1, some times.
FAILS = """import os
if os.environ.get("RANK") == "1":
    import psutil
    times, ask = [], psutil.Process.memory_info
    def memory_info(self):
        times.append(1)
        if len(times) <= TIMES:
            raise ZeroDivisionError("injected")
        return ask(self)
    psutil.Process.memory_info = memory_info
"""


@pytest.mark.parametrize(("times", "status"), [(2, 0), (10**6, 1)], ids=["twice", "always"])
def test_an_error_of_the_monitor_is_survived_or_told_by_the_rank_that_has_it(
    times: int, status: int, tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS.replace("TIMES", str(times)))
    job = start_launcher(
        "--nproc_per_node", "2", "flux", "--path", tiny_flux_folder, "--device", "cpu", "--device_type", "A2-32g-dual",
        "--prompt_path", prompt_file, "--width", "64", "--height", "64", "--infer_steps", "8", "--do_quant",
        "--quant_weight_save_folder", tmp_path / "weights", "--quant_dump_calib_folder", tmp_path / "dumps",
        python_path=[tmp_path],
    )  # fmt: skip
    output, _ = job.communicate(timeout=120)
    assert job.returncode == status, output
    log = [json.loads(line) for line in (tmp_path / "weights" / "logs" / "rank1.jsonl").read_text().splitlines()]
    assert any(entry["text"] == "the monitor could not look" and "injected" in entry["traceback"] for entry in log)
    if status:
        assert "error: ZeroDivisionError: injected\n  where  rank 1, " in output
