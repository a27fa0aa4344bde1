"""Run the tiny two-rank job of the fault matrix, whole or with a fault in it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.fault_table import HANG_S, JOBS, RANKS, Fault
from scripts.fault_worker import ACTED
from scripts.make_tiny_pipeline import make_tiny_pipeline, write_prompts

ROOT = Path(__file__).resolve().parents[1]
# What the struck rank touches.
MARK = "struck"
# A person who types Ctrl-C twice needs as long.
_BETWEEN_INTERRUPTS_S = 0.5


@dataclass(frozen=True)
class Bench:
    """A tiny pipeline and its prompts, the folder below which everything is written, and whose jobs they are.

    user: who runs the jobs; this process must be root's then. It may read everything, for Python may lie where only
    root can read; what it writes is its own.
    """

    work: Path
    model: Path
    prompts: Path
    user: str | None = None

    @classmethod
    def make(cls, work: Path, user: str | None = None) -> Bench:
        """Make the inputs below `work`."""
        return cls(work, make_tiny_pipeline("flux", work / "tiny-flux"), write_prompts(work / "prompts.txt"), user)

    def words(self, out: Path, job: str = "one copy", flags: Sequence[str] = ()) -> list[str]:
        """Return the command of a job; flags: further ones of torchrun."""
        words = [
            *self._become_the_user(), sys.executable, ROOT / "scripts" / "fault_worker.py",
            "--nproc_per_node", len(RANKS), *flags,
            "flux", "--path", self.model, "--device", "cpu", *JOBS[job],
            "--prompt_path", self.prompts, "--width", "64", "--height", "64",
            "--infer_steps", "2", "--do_quant", "--quant_type", "w8a8_timestep",
            "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps",
            "--hang_timeout", HANG_S, "--timeout_s", "120",
        ]  # fmt: skip
        return list(map(str, words))

    def run(
        self, out: Path, fault: Fault | None = None, *, job: str = "one copy", flags: Sequence[str] = ()
    ) -> tuple[int, str, float]:
        """Run a job once; returns its exit status, what it printed, and when it had ended (epoch seconds)."""
        told = fault and {"kind": fault.strikes, "stage": fault.stage, "rank": fault.rank, "mark": str(out / MARK)}
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(told)}
        if self.user:
            out.mkdir(exist_ok=True)
            shutil.chown(out, self.user)
            environ["HOME"] = "/nonexistent"
        with subprocess.Popen(
            self.words(out, job, flags), env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        ) as running:  # fmt: skip
            try:
                if fault and fault.row.outside:
                    self._act(fault, out, running)
                text = running.communicate(timeout=300)[0] or ""
            except BaseException:
                running.kill()
                raise
        return running.returncode, text, time.time()

    def _become_the_user(self) -> list[str]:
        if self.user is None:
            return []
        group, reads = pwd.getpwnam(self.user).pw_gid, "+dac_read_search"
        who = [f"--reuid={self.user}", f"--regid={group}", "--clear-groups"]
        return ["setpriv", *who, f"--inh-caps={reads}", f"--ambient-caps={reads}"]

    def _act(self, fault: Fault, out: Path, running: subprocess.Popen[str]) -> None:
        """Do somebody else's part as soon as the job has come to the place."""
        while not (out / MARK).exists() and running.poll() is None:
            time.sleep(0.02)
        problem = OUTSIDE[fault.row.outside](self, out, running)
        (out / ACTED).write_text(problem)


def _lose_the_reader(bench: Bench, out: Path, running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    running.stdout.close()
    running.stdout = None
    return ""


def _lose_the_reader_and_interrupt_twice(bench: Bench, out: Path, running: subprocess.Popen[str]) -> str:
    _lose_the_reader(bench, out, running)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(_BETWEEN_INTERRUPTS_S)
    return ""


def _start_a_second_job(bench: Bench, out: Path, running: subprocess.Popen[str]) -> str:
    status, said, _ = bench.run(out)
    is_refused = status == 6 and "another job works in this folder" in said
    return "" if is_refused else f"the second job ended with {status}: {said[-1500:]}"


# What somebody else does while the job stands still at the place; each returns what was wrong about it.
OUTSIDE: Mapping[str, Callable[[Bench, Path, subprocess.Popen[str]], str]] = {
    "lose the reader": _lose_the_reader,
    "lose the reader, interrupt twice": _lose_the_reader_and_interrupt_twice,
    "start a second job": _start_a_second_job,
}
