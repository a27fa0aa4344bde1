"""Measure what jobs cost beside the least they could: processor and wall time, memory, bytes, as one table.

    python scripts/bench                                    every job, three times (hours; 60 GB of disk)
    python scripts/bench --jobs tiny,memory --repeat 1      a look
    python scripts/bench --startup                          from the command to the first forward of the tiny job
    python scripts/bench --kernel                           the rate of maxima and codes beside that of a copy
    python scripts/bench --device cuda                      the same on a card; two ranks share one if there is one

A floor runs right before each of our jobs, so that both see the same machine; only their ratio means something on
another one. A pipeline's files are cold at the start of each. What a floor does and leaves out is said in
`in_memory.py` and `from_disk.py`; which jobs there are, in `rows.py`. In pairs ours comes first, then the floor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone that is not installed works as well
from scripts.bench import page_cache
from scripts.bench.cost import PYTHON_PATH, ROOT, CommandFailed, Cost, run
from scripts.bench.rows import GROUPS, PIPELINES, ROWS, SMOKE, Command, Row
from scripts.bench.stages import read_stages
from scripts.bench.table import Measured, lines

_PROMPTS = (
    "A photo of an astronaut riding a horse on mars",
    "A bowl of ripe cherries on a blue table, soft morning light",
    "The word 'quantize' written in chalk on a blackboard",
    "An old lighthouse in a storm, oil painting",
)
# A rank has a core for itself; work in one process may use two, unless the caller says something else.
_THREADS_OF_ONE = os.environ.get("OMP_NUM_THREADS", "2")


class Bench:
    """Measure rows below a work folder: pipelines are made there once and stay, outputs go."""

    def __init__(self, folder: Path, repeat: int, device: str) -> None:
        self._folder, self._repeat, self._device = folder, repeat, device
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, row: Row) -> Measured:
        """Run a row's floor and job in turns."""
        if row.variant and self._device != "cpu":
            from scripts.bench import on_card

            say(row.name)
            return on_card.measure(row.name, row.variant, self._folder / "out", self._repeat, self._device)
        self._prepare(row)
        pairs = []
        for number in range(1, self._repeat + 1):
            say(f"{row.name}, {number} of {self._repeat}")
            floor = self._run(row, row.floor)
            ours = self._run(row, row.ours, told=True)
            pairs.append((ours, floor))
        return Measured(row.name, pairs)

    def _prepare(self, row: Row) -> None:
        if row.pipeline is None:
            return
        folder = self._pipeline(row)
        if not folder.exists():
            say(f"making {folder}")
            PIPELINES[row.pipeline](folder)
        prompts = self._folder / f"prompts{row.prompts}.txt"
        prompts.write_text("".join(f"{prompt}\n" for prompt in _PROMPTS[: row.prompts]))
        prompts.chmod(0o640)

    def _run(self, row: Row, command: Command, *, told: bool = False) -> Cost:
        out = self._folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        places = {
            "folder": str(self._pipeline(row)),
            "prompts": str(self._folder / f"prompts{row.prompts}.txt"),
            "out": str(out),
            "device": self._device,
        }
        page_cache.make_cold(self._pipeline(row))
        is_ranked = "torch.distributed.run" in command
        threads = {"OMP_NUM_THREADS": _THREADS_OF_ONE} if not is_ranked else {}
        try:
            # No digest of the model is remembered from an earlier run.
            environ = {"PYTHONPATH": PYTHON_PATH, "XDG_CACHE_HOME": str(out / "cache"), **threads}
            cost = run([word.format(**places) for word in command], environ)
            say(f"  {'ours' if told else 'floor'}: {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of processor")
            if told and is_ranked:
                self._tell_stages(row, out / "weights", cost)
            return cost
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _tell_stages(self, row: Row, weights: Path, cost: Cost) -> None:
        stages = read_stages(weights, cost.resident_bytes)
        for stage in stages:
            say(f"  rank {stage.rank}, {stage.name}: {stage.seconds:.1f} s, at most {stage.peak_bytes / 2**30:.2f} GiB")
        if row.is_static and self._device == "cpu":
            from scripts.bench.forecast import compare

            for line in compare(row, self._pipeline(row), stages):
                say(f"  {line}")

    def _pipeline(self, row: Row) -> Path:
        return self._folder / (row.pipeline or "none")


def say(text: str) -> None:
    """Tell how far the measurement is, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    asked = _parser().parse_args(arguments)
    if asked.kernel:
        from scripts.bench.rates import measure_rates

        for rate in measure_rates(asked.device):
            print(
                f"{rate.way:<24} {rate.weights / 1e6:9.0f} million weights/s, {rate.of_copy:4.0%} of a copy's bandwidth"
            )
        return 0
    if asked.startup:
        from scripts.bench.startup import report

        print("\n".join(report(asked.folder.resolve(), asked.repeat)))
        return 0
    rows = [SMOKE] if asked.smoke else [row for row in ROWS if row.group in asked.jobs and asked.only in row.name]
    bench = Bench(asked.folder.resolve(), asked.repeat, asked.device)
    say(f"{os.cpu_count()} cores; each pipeline's files are advised out of the page cache before each run")
    try:
        measured = [bench.measure(row) for row in rows]
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines(measured, markdown=asked.markdown)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=_groups, default=GROUPS, help=f"of {','.join(GROUPS)} (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name holds this text")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the median counts (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where jobs and floors compute")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo" / "bench", help="work folder; pipelines in it are made once"
    )
    parser.add_argument("--startup", action="store_true", help="measure the way to the first forward instead")
    parser.add_argument("--kernel", action="store_true", help="measure the rate of the arithmetic instead")
    parser.add_argument("--smoke", action="store_true", help="one small row, to see that measuring works")
    return parser


def _groups(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := set(words) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"no jobs are called {', '.join(sorted(unknown))}")
    return words


if __name__ == "__main__":
    sys.exit(main())
