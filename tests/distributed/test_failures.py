"""Some cells of the fault matrix: a job that breaks ends quickly, names the culprit, and resumes to the same bytes.

All cells are run by `scripts/fault_matrix.py`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.fault_bench import MARK, Bench
from scripts.fault_matrix import can_mount, files_below, try_fault
from scripts.fault_table import RANKS, Fault
from tests.support.forked_ranks import run_forked

pytestmark = pytest.mark.distributed

# The script holds a quiet machine to the limit; here other tests run at the same time.
ALLOWANCE = 4


class GoesOnForked(Bench):
    """A bench whose jobs without a fault are run by forked ranks: what they publish is looked at, not their start."""

    def run(
        self, out: Path, fault: Fault | None = None, *, job: str = "one copy", flags: Sequence[str] = ()
    ) -> tuple[int, str, float]:
        """Run a job once; returns its exit status, what it printed, and when it had ended (epoch seconds)."""
        if fault:
            return super().run(out, fault, job=job, flags=flags)
        words = self.words(out, job)
        done = run_forked(len(RANKS), "-m", "launcher", *words[words.index("flux") :])
        return done.returncode or 0, done.stdout + done.stderr, time.time()


@pytest.fixture(scope="module")
def bench(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    from scripts.make_tiny_pipeline import write_prompts

    work = tmp_path_factory.mktemp("faults")
    return GoesOnForked(work, tiny_flux_folder, write_prompts(work / "prompts.txt"))


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> dict[str, bytes]:
    umask = os.umask(0)  # which lets everybody read and write what a careless program makes
    try:
        status, text, _ = Bench.run(bench, bench.work / "undisturbed")  # under the supervisor
    finally:
        os.umask(umask)
    assert status == 0, text
    return files_below(bench.work / "undisturbed")


def test_an_undisturbed_run_says_so_in_its_status_and_keeps_its_files_private(bench: Bench, undisturbed) -> None:
    out = bench.work / "undisturbed"
    status = json.loads((out / "weights" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["error"]) == ("published", 0, None)
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert {path.stat().st_mode & 0o777 for path in (out / "weights", out / "dumps", out / "weights" / "logs")} == {
        0o750
    }
    for rank in (0, 1):
        lines = (out / "weights" / "logs" / f"rank{rank}.jsonl").read_text().splitlines()
        assert [entry["stage"] for entry in map(json.loads, lines) if "stage" in entry] == [
            "prepare", "calibrate", "load", "calibrate", "quantize", "merge"
        ]  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        Fault("kill -9", "merge", 0),  # between the renaming of the shards and the manifest
        Fault("frozen", "calibrate", 1),  # nobody notices but the heartbeat
        Fault("frozen", "end", 1),  # all is published, and rank 0 waits
    ],
    ids=lambda fault: f"{fault.kind} in {fault.stage} on rank {fault.rank}",
)
def test_a_broken_job_ends_names_the_culprit_and_resumes_to_the_same_bytes(
    fault: Fault, bench: Bench, undisturbed: dict[str, bytes]
) -> None:
    assert try_fault(bench, fault, undisturbed, ALLOWANCE).problems == []


def test_a_full_disk_is_called_full_and_nothing_is_lost(bench: Bench, undisturbed: dict[str, bytes]) -> None:
    if not can_mount():
        pytest.skip("a small file system cannot be mounted here")
    assert try_fault(bench, Fault("full disk", "calibrate", 1), undisturbed, ALLOWANCE).problems == []


def test_torchrun_restarts_the_ranks_and_they_go_on_where_they_were(bench: Bench, undisturbed) -> None:
    out = bench.work / "restarted"
    out.mkdir()
    status, text, _ = bench.run(out, Fault("kill -9", "quantize", 1), flags=["--max-restarts", "1"])
    assert status == 0, text
    assert (out / MARK).exists()
    assert "calibrate: reusing" in text
    assert files_below(out) == undisturbed
