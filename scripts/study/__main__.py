"""Quantize the small trained models in many ways and compare what they paint: one table, as markdown.

    python scripts/study                               the rows that say something, minutes a model and seed
    python scripts/study --models sd3 --seeds 1        a look
    python scripts/study --full                        every combination that is allowed, hours

`scripts/study.md` holds two of the default's three seeds, as `--seeds 2` measures them, and remarks written by hand; it
is written over only where `--out` names it.

Each figure is the mean over seeds with its standard deviation; a seed has its own prompts and noise to calibrate, and
its own noise to paint. Everything is done in this process. A cell that is done stands in `results.jsonl` of the work
folder and is not done again; `--table` only writes the table of what is there. A table is of one number of pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone that is not installed works as well

import torch

from quant_core.atomic_file import write_text_atomically
from scripts.study.grid import Method, chosen, full
from scripts.study.subject import (
    AT_ONCE,
    CALIBRATED,
    PAINTED,
    STEPS,
    VARIANTS,
    Subject,
    model_folder,
    quiet_libraries,
)
from scripts.study.table import Cell, markdown

ROOT = Path(__file__).resolve().parents[2]
# The row of the model itself: which of its pictures are right, and the noise floor's likeness to them.
FLOAT = {"scheme": "float; noise floor", "smoothing": "", "estimator": "", "numerics": ""}


class Study:
    """Measure cells and keep them in a file, one a line."""

    def __init__(self, work: Path, pictures: int) -> None:
        self.work, self.pictures = work, pictures
        self.file = work / "results.jsonl"
        work.mkdir(parents=True, exist_ok=True)

    def cells(self) -> list[Cell]:
        """Return what has been measured with so many pictures."""
        cells = map(json.loads, self._lines().splitlines())
        return [cell for cell in cells if cell.get("pictures") == self.pictures]

    def _lines(self) -> str:
        """Return the file's lines but a last one that was cut short."""
        content = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return content[: content.rfind("\n") + 1]

    def measure(self, model: str, seed: int, methods: Iterable[Method]) -> None:
        """Measure one model and seed, but what is there."""
        done = [{name: cell[name] for name in FLOAT} for cell in self.cells() if self._is_of(cell, model, seed)]
        missing = [method for method in methods if asdict(method) not in done]
        if FLOAT in done and not missing:
            return
        folder = self.work / model.replace(", ", "_") / str(seed)
        subject = Subject(model.partition(",")[0], model_folder(model, self.work), seed, self.pictures, folder)
        figures = subject.float_figures()
        if FLOAT not in done:
            self._keep(model, seed, {**FLOAT, **figures})
        for number, method in enumerate(missing, start=1):
            began = time.monotonic()
            self._keep(model, seed, {**asdict(method), **subject.figures(method)})
            print(f"{model}, seed {seed}: {number}/{len(missing)} ({time.monotonic() - began:.0f} s)", flush=True)

    def _is_of(self, cell: Cell, model: str, seed: int) -> bool:
        return (cell["model"], cell["seed"]) == (model, seed)

    def _keep(self, model: str, seed: int, found: Cell) -> None:
        cell = {"model": model, "seed": seed, "pictures": self.pictures, **found}
        write_text_atomically(self.file, self._lines() + json.dumps(cell) + "\n")


def text(cells: Iterable[Cell], pictures: int) -> Iterator[str]:
    """Yield the lines of the whole document."""
    found = list(cells)
    seeds = len({cell["seed"] for cell in found})
    yield "# What quantization does to the small trained models\n"
    yield (
        f"Made by `python scripts/study`. Up to {seeds} seeds; each calibrates on {CALIBRATED} prompts and paints "
        f"{pictures} others, 64 × 64, in {STEPS} steps. Layers, output and PSNR in decibels; right are pictures that "
        "show shape, colour and ground as the prompt says. Mean ± standard deviation over seeds. The first row of a "
        "model is its noise floor: the same pictures with the transformer computed in another dtype."
    )
    yield from markdown(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=ROOT / "demo" / "study", help="folder of results and pictures")
    parser.add_argument("--out", type=Path, help="file of the table (default: study.md in the work folder)")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="each has prompts of its own")
    parser.add_argument("--pictures", type=int, default=AT_ONCE, choices=range(1, PAINTED + 1), metavar="N")
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--table", action="store_true", help="only write the table")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet_libraries()
    study = Study(asked.work, asked.pictures)
    for seed in () if asked.table else range(asked.seeds):
        for model in asked.models:
            study.measure(model, seed, full() if asked.full else chosen(model.partition(",")[0]))
    out = asked.out or asked.work / "study.md"
    out.write_text("\n".join(text(study.cells(), asked.pictures)) + "\n", encoding="utf-8")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
