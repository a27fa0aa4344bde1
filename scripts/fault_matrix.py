"""Break a two-rank job in every way at every stage, and show that it ends quickly, names the culprit and resumes.

    python scripts/fault_matrix.py                              all 48 cells, about half an hour on two cores
    python scripts/fault_matrix.py --faults "kill -9" --stages merge --ranks 0
    python scripts/fault_matrix.py --repeat 20                  no fault: the same job many times, the same bytes

Each cell runs the tiny FLUX with one fault under the supervisor, then once more without. It passes when

    all processes are gone within the limit      the exit status is that of the fault's kind
    the terminal and status.json name the rank   no file under a final name differs from an undisturbed run's
    the second run publishes, byte for byte, what an undisturbed run publishes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.journal.status import read_status  # noqa: E402
from scripts.fault_worker import FILLER, KINDS, STAGES  # noqa: E402
from scripts.make_tiny_pipeline import make_tiny_pipeline, write_prompts  # noqa: E402

WORLD = 2
RANKS = (0, WORLD - 1)
HANG_S = 4  # --hang_timeout: as short as a loaded machine allows, so that freezing is found within the ten seconds
LIMIT_S = 10.0
DISK_BYTES = 32 * 2**20  # a few times the size of the whole run
# The exit status that each fault must lead to; 0 where the job can still be finished.
EXPECTED = {"kill -9": 6, "SIGTERM": 75, "exception": 1, "OOM error": 5, "full disk": 3, "frozen": 6}
# Who is asked to leave when nothing is left to do finishes; where one rank fills the disk while another needs its last
# few bytes, the faster one decides.
FINISHES = {("SIGTERM", "merge", 0), ("SIGTERM", "merge", 1)}
MAY_FINISH = {("full disk", "merge", 1)}
_VOLATILE = re.compile(r"(^|/)(logs/.*|status\.json|quant_job\.yaml)$")


@dataclass(frozen=True)
class Fault:
    """One cell of the matrix."""

    kind: str
    stage: str
    rank: int

    @property
    def statuses(self) -> set[int]:
        """The exit statuses that the job may end with, one but for a race."""
        place = (self.kind, self.stage, self.rank)
        if place in FINISHES:
            return {0}
        return {EXPECTED[self.kind], 0} if place in MAY_FINISH else {EXPECTED[self.kind]}


@dataclass
class Cell:
    """What was seen: seconds from the strike until all processes were gone, the exit status, what was wrong."""

    fault: Fault
    seconds: float
    status: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """A tiny pipeline, its prompts and the files of an undisturbed run."""

    work: Path
    model: Path
    prompts: Path

    @classmethod
    def make(cls, work: Path) -> Bench:
        """Make the inputs below `work`."""
        return cls(work, make_tiny_pipeline("flux", work / "tiny-flux"), write_prompts(work / "prompts.txt"))

    def run(
        self, out: Path, fault: dict[str, object] | None = None, flags: Sequence[str] = ()
    ) -> tuple[int, str, float]:
        """Run the job once; returns its exit status, what it printed, and when it had ended (epoch seconds).

        flags: further ones of torchrun.
        """
        words = [
            sys.executable, str(ROOT / "scripts" / "fault_worker.py"), "--nproc_per_node", str(WORLD), *flags,
            "flux", "--path", self.model, "--device", "cpu", "--device_type", "A2-32g-dual",
            "--prompt_path", self.prompts, "--max_num_prompt", "3", "--width", "64", "--height", "64",
            "--infer_steps", "2", "--do_quant", "--quant_type", "w8a8_timestep",
            "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps",
            "--hang_timeout", str(HANG_S), "--timeout_s", "120",
        ]  # fmt: skip
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault)}
        done = subprocess.run(
            list(map(str, words)), env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout + done.stderr, time.time()


def try_fault(bench: Bench, fault: Fault, undisturbed: dict[str, bytes], limit_s: float = LIMIT_S) -> Cell:
    """Run one cell in a folder of its own; the job must be gone within `limit_s` seconds."""
    out = bench.work / "cell"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with _small_disk(out) if fault.kind == "full disk" else nullcontext():
        return _try_in(out, bench, fault, undisturbed, limit_s)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system of its own on the folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount() -> bool:
    """Tell whether this process may mount a file system."""
    try:
        with tempfile.TemporaryDirectory() as folder, _small_disk(Path(folder)):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _try_in(out: Path, bench: Bench, fault: Fault, undisturbed: dict[str, bytes], limit_s: float) -> Cell:
    mark = out / "struck"
    status, text, ended = bench.run(
        out, {"kind": fault.kind, "stage": fault.stage, "rank": fault.rank, "mark": str(mark)}
    )
    if not mark.exists():
        return Cell(fault, 0.0, status, [f"the fault never struck: {text[-2000:]}"])
    cell = Cell(fault, ended - mark.stat().st_mtime, status)
    if cell.seconds > limit_s:
        cell.problems.append(f"took {cell.seconds:.1f} s to end")
    cell.problems += _after_the_fault(fault, cell, out, text, undisturbed)
    (out / FILLER).unlink(missing_ok=True)
    cell.problems += _after_the_second_run(bench, out, undisturbed)
    return cell


def _after_the_fault(fault: Fault, cell: Cell, out: Path, text: str, undisturbed: dict[str, bytes]) -> Iterator[str]:
    if cell.status not in fault.statuses:
        yield f"ended with {cell.status}, not {fault.statuses}: {text[-1500:]}"
    if left := [process.pid for process in psutil.process_iter() if _belongs(process, out)]:
        yield f"processes {left} are left"
    told = read_status(out / "weights") or {}
    if told.get("exit_code") != cell.status:
        yield f"status.json says {told}"
    if cell.status not in (0, 75):  # who was asked to leave has no culprit
        ranks = RANKS if fault.kind == "full disk" else (fault.rank,)  # whoever writes next finds it full
        if not any(f"rank {rank}" in text for rank in ranks):
            yield "the terminal does not name the rank"
        if not any(f"rank {rank}" in (told.get("error") or {}).get("where", "") for rank in ranks):
            yield f"status.json says {told}"
    for name, content in files_below(out).items():
        if name in undisturbed and content != undisturbed[name]:
            yield f"{name} stands under its final name and is not what it must be"


def _after_the_second_run(bench: Bench, out: Path, undisturbed: dict[str, bytes]) -> Iterator[str]:
    status, text, _ = bench.run(out)
    if status != 0:
        yield f"the second run ended with {status}: {text[-1500:]}"
    if different := sorted(name for name in undisturbed if files_below(out).get(name) != undisturbed[name]):
        yield f"the second run made other bytes: {different}"


def _belongs(process: psutil.Process, out: Path) -> bool:
    try:
        return any(str(out) in word for word in process.cmdline())
    except psutil.Error:
        return False


def files_below(out: Path) -> dict[str, bytes]:
    """Return the content of every result file (no logs, no hidden files), by its path below `out`."""
    return {
        name: path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and not _VOLATILE.search(name := path.relative_to(out).as_posix())
        and not any(part.startswith(".") for part in path.relative_to(out).parts)
        and name not in ("struck", FILLER)
    }


def table(cells: Sequence[Cell]) -> str:
    """Return the matrix: a line for each fault and stage, with seconds and exit status by rank."""
    lines = [
        f"| fault | stage | {' | '.join(f'rank {rank}: s, exit' for rank in RANKS)} |",
        "|---|---|" + "---|" * WORLD,
    ]
    by_place = {(cell.fault.kind, cell.fault.stage, cell.fault.rank): cell for cell in cells}
    for kind, stage in dict.fromkeys((cell.fault.kind, cell.fault.stage) for cell in cells):
        shown = (_shown(by_place.get((kind, stage, rank))) for rank in RANKS)
        lines.append(f"| {kind} | {stage} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.seconds:.1f}, {cell.status}{' !!' if cell.problems else ''}"


def repeat(bench: Bench, undisturbed: dict[str, bytes], times: int) -> int:
    """Run the undisturbed job again and again in a new folder; returns how many runs hung, failed or differed."""
    bad, seconds = 0, []
    for _ in range(times):
        out = bench.work / "again"
        shutil.rmtree(out, ignore_errors=True)
        start = time.time()
        status, _text, ended = bench.run(out)
        seconds.append(ended - start)
        bad += status != 0 or files_below(out) != undisturbed
    print(f"{times} runs, {bad} with a failure or other bytes, {min(seconds):.1f} to {max(seconds):.1f} s each")
    return bad


def main() -> int:
    """Run the chosen cells, print each as it ends and the table at last; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--repeat", type=int, default=0, metavar="N", help="run the undisturbed job N times instead")
    options = parser.parse_args()
    if "full disk" in options.faults and os.geteuid() != 0:
        # Mounting takes root, or a name space of one's own.
        words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvp(words[0], words)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="fault_matrix_") as work:
        bench = Bench.make(Path(work))
        status, text, _ = bench.run(bench.work / "undisturbed")
        if status != 0:
            print(text)
            return 1
        undisturbed = files_below(bench.work / "undisturbed")
        if options.repeat:
            return repeat(bench, undisturbed, options.repeat)
        for kind, stage, rank in product(options.faults, options.stages, options.ranks):
            cells.append(try_fault(bench, Fault(kind, stage, rank), undisturbed))
            cell = cells[-1]
            mark = "!!" if cell.problems else "ok"
            print(f"{mark} {kind}, {stage}, rank {rank}: {cell.seconds:.1f} s, exit {cell.status}", flush=True)
            print("".join(f"   {problem}\n" for problem in cell.problems), end="", flush=True)
    failed = sum(bool(cell.problems) for cell in cells)
    print(f"\n{table(cells)}\n\n{len(cells) - failed} of {len(cells)} cells passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
