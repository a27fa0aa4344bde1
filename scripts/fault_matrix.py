"""Break a two-rank job in every way at every stage, and show that it ends quickly, names the culprit and resumes.

    python scripts/fault_matrix.py                              all cells of `fault_table.py`, half an hour on two cores
    python scripts/fault_matrix.py --faults "kill -9" --stages merge --ranks 0
    python scripts/fault_matrix.py --user nobody                the jobs of another user; root only
    python scripts/fault_matrix.py --repeat 20                  no fault: the same job many times, the same bytes

Each cell runs the tiny FLUX with one fault under the supervisor, then once more without; where a byte is flipped there
is a run in between, which makes that file again or refuses it by its name. A cell passes when

    all processes are gone within the limit      the exit status is that of the fault's kind
    the terminal and status.json name the rank,  no file under a final name differs from an undisturbed run's
      where one is to blame
    the last run publishes, byte for byte, what an undisturbed run publishes
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.journal.status import read_status  # noqa: E402
from scripts.fault_bench import MARK, Bench  # noqa: E402
from scripts.fault_table import RANKS, ROWS, Fault, cells  # noqa: E402
from scripts.fault_worker import ACTED, FILLER, PLACES  # noqa: E402

DISK_BYTES = 32 * 2**20  # a few times the size of the whole run
_VOLATILE = re.compile(r"(^|/)(logs/.*|status\.json|quant_job\.yaml)$")


@dataclass
class Cell:
    """What was seen: seconds from the strike until all processes were gone, the exit status, what was wrong."""

    fault: Fault
    seconds: float
    status: int
    problems: list[str] = field(default_factory=list)


def try_fault(bench: Bench, fault: Fault, undisturbed: dict[str, bytes], allowance: float = 1) -> Cell:
    """Run one cell in a folder of its own.

    undisturbed: the files of an undisturbed run of the same job; allowance: by how much a machine with other work may
        take longer than the limit.
    """
    out = bench.work / "cell"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with _small_disk(out) if fault.row.mounts == "matrix" else nullcontext():
        return _try_in(out, bench, fault, undisturbed, allowance)


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


def _try_in(out: Path, bench: Bench, fault: Fault, undisturbed: dict[str, bytes], allowance: float) -> Cell:
    status, text, ended = bench.run(out, fault, job=fault.row.job)
    if not (out / MARK).exists():
        return Cell(fault, 0.0, status, [f"the fault never struck: {text[-2000:]}"])
    cell = Cell(fault, ended - (out / MARK).stat().st_mtime, status)
    if fault.row.outside and (problem := (out / ACTED).read_text()):
        cell.problems.append(problem)
    if status != 0 and cell.seconds > allowance * fault.row.limit_s:
        cell.problems.append(f"took {cell.seconds:.1f} s to end")
    cell.problems += _after_the_fault(fault, cell, out, text, undisturbed)
    (out / FILLER).unlink(missing_ok=True)
    if fault.row.spoils:
        cell.problems += _with_a_flipped_byte(bench, fault, out)
    cell.problems += _after_the_last_run(bench, fault, out, undisturbed)
    return cell


def _after_the_fault(fault: Fault, cell: Cell, out: Path, text: str, undisturbed: dict[str, bytes]) -> Iterator[str]:
    if cell.status not in fault.statuses:
        yield f"ended with {cell.status}, not {fault.statuses}: {text[-1500:]}"
    if left := [process.pid for process in psutil.process_iter() if _belongs(process, out)]:
        yield f"processes {left} are left"
    told = read_status(out / "weights") or {}
    if told.get("exit_code") != cell.status:
        yield f"status.json says {told}"
    if fault.culprit and cell.status != 0:
        printed = "\n".join(line for line in text.splitlines() if line.startswith("  where "))
        for place, where in (("the terminal", printed), ("status.json", (told.get("error") or {}).get("where", ""))):
            if not re.search(fault.culprit, where):
                yield f"{place} does not name {fault.culprit}: {where or text[-1500:]}"
    for name, content in files_below(out).items():
        if name in undisturbed and content != undisturbed[name]:
            yield f"{name} stands under its final name and is not what it must be"


def _with_a_flipped_byte(bench: Bench, fault: Fault, out: Path) -> Iterator[str]:
    """Flip a byte in the middle of a file and run the job; it heals by itself, or names the file, which is removed."""
    [path] = out.glob(fault.row.spoils)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, text, _ = bench.run(out, job=fault.row.job)
    if status != fault.row.then:
        yield f"with a flipped byte the job ended with {status}: {text[-1500:]}"
    if status != 0:
        if path.name not in text:
            yield f"the terminal does not name {path.name}: {text[-1500:]}"
        path.unlink()


def _after_the_last_run(bench: Bench, fault: Fault, out: Path, undisturbed: dict[str, bytes]) -> Iterator[str]:
    status, text, _ = bench.run(out, job=fault.row.job)
    if status != 0:
        yield f"the last run ended with {status}: {text[-1500:]}"
    if different := sorted(name for name in undisturbed if files_below(out).get(name) != undisturbed[name]):
        yield f"the last run made other bytes: {different}"


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
        and name not in (MARK, ACTED, FILLER)
    }


def table(cells: Sequence[Cell]) -> str:
    """Return the matrix: a line for each fault and stage, with seconds and exit status by rank."""
    lines = [
        f"| fault | stage | {' | '.join(f'rank {rank}: s, exit' for rank in RANKS)} |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    by_place = {(cell.fault.kind, cell.fault.stage, cell.fault.rank): cell for cell in cells}
    for kind, stage in dict.fromkeys((cell.fault.kind, cell.fault.stage) for cell in cells):
        shown = (_shown(by_place.get((kind, stage, rank))) for rank in RANKS)
        lines.append(f"| {kind} | {stage} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.seconds:.1f}, {cell.status}{' !!' if cell.problems else ''}"


def repeat(bench: Bench, times: int) -> int:
    """Run the undisturbed job again and again in a new folder; returns how many runs hung, failed or differed."""
    undisturbed = _undisturbed(bench, "one copy")
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
    parser.add_argument("--faults", nargs="*", default=[], choices=list(ROWS), metavar="FAULT", help=", ".join(ROWS))
    parser.add_argument("--stages", nargs="*", default=[], choices=list(PLACES), metavar="STAGE")
    parser.add_argument("--ranks", nargs="*", type=int, default=[], choices=RANKS, metavar="RANK")
    parser.add_argument("--user", help="run the jobs as this user, who may read everything and write what is its own")
    parser.add_argument("--repeat", type=int, default=0, metavar="N", help="run the undisturbed job N times instead")
    options = parser.parse_args()
    chosen = list(cells(tuple(options.faults), tuple(options.stages), tuple(options.ranks)))
    if not chosen:
        parser.error("no cell has that fault at that stage on that rank: see `fault_table.py`")
    apart = [fault for fault in chosen if fault.row.mounts and os.geteuid() != 0]
    apart += [fault for fault in chosen if options.user and fault.row.mounts == "rank"]  # an ordinary user cannot
    with tempfile.TemporaryDirectory(prefix="fault_matrix_") as work:
        bench = Bench.make(Path(work), options.user)
        if options.repeat:
            return repeat(bench, options.repeat)
        failed = _run_all(bench, [fault for fault in chosen if fault not in apart])
    return int(failed > 0) | (_run_in_a_name_space(apart) if apart else 0)


def _run_in_a_name_space(faults: Sequence[Fault]) -> int:
    """Run the cells that mount a file system where this user is root; returns the exit status."""
    print("in a name space of their own:", flush=True)
    cells_of = ["--faults", *dict.fromkeys(fault.kind for fault in faults)]
    cells_of += ["--stages", *dict.fromkeys(fault.stage for fault in faults)]
    cells_of += ["--ranks", *dict.fromkeys(str(fault.rank) for fault in faults)]
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, __file__, *cells_of]
    return subprocess.run(words, check=False).returncode


def _run_all(bench: Bench, faults: Sequence[Fault]) -> int:
    """Run the cells, print them and the table; returns how many failed."""
    seen: list[Cell] = []
    undisturbed: dict[str, dict[str, bytes]] = {}
    for fault in faults:
        job = fault.row.job
        if job not in undisturbed:
            undisturbed[job] = _undisturbed(bench, job)
        seen.append(cell := try_fault(bench, fault, undisturbed[job]))
        mark = "!!" if cell.problems else "ok"
        print(f"{mark} {fault.kind}, {fault.stage}, rank {fault.rank}: {cell.seconds:.1f} s, exit {cell.status}")
        print("".join(f"   {problem}\n" for problem in cell.problems), end="", flush=True)
    failed = sum(bool(cell.problems) for cell in seen)
    print(f"\n{table(seen)}\n\n{len(seen) - failed} of {len(seen)} cells passed", flush=True)
    return failed


def _undisturbed(bench: Bench, job: str) -> dict[str, bytes]:
    out = bench.work / f"undisturbed, {job}"
    status, text, _ = bench.run(out, job=job)
    if status != 0:
        raise SystemExit(text)
    return files_below(out)


if __name__ == "__main__":
    sys.exit(main())
