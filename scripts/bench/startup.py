"""Measure the way from the command to the first forward of the tiny two-rank job, and what the ranks import for it.

Where one part of the way ends stands in two places: the log of rank 0 says when its stages begin and when the prompts
were encoded, and `traced_rank.py` notes the rest. Beside it stands a plain script that loads the same pipeline under
torchrun and calls it (`plain_start.py`), and the same script as one process without torchrun, run in turns with ours.
What is imported is asked of Python itself (`-X importtime`), in a run of its own, because asking takes time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from operator import truediv
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts.bench.cost import PYTHON_PATH, ROOT, python, run
from scripts.bench.rows import PIPELINES
from scripts.bench.stages import begun, said

_FLAGS = (
    *("--device", "cpu", "--device_type", "A2-32g-dual", "--width", "64", "--height", "64", "--infer_steps", "2"),
    *("--do_quant", "--quant_type", "w8a8_dynamic"),
)
_TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
_SHOWN = 10
# Each part of the way, by the mark that ends it.
_PARTS = {
    "torchrun starts the ranks": "interpreter",
    "parse and validate": "torch begins",
    "import torch and what needs it first": "diffusers begins",
    "import diffusers, connect, form the groups": "prepare",
    "describe and check; know the model by its content": "calibrate",
    "look at the dump": "load",
    "load the text encoders, encode": "encoded",
    "load the transformer and the pipeline, first step": "first forward",
}
_IMPORT_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \| *(\S+)")


def report(folder: Path, repeat: int) -> list[str]:
    """Return lines for a person: seconds by part (median of the repeats), then the imports of rank 0."""
    pipeline = folder / "flux-tiny"
    if not pipeline.exists():
        PIPELINES["flux-tiny"](pipeline)
    prompts = folder / "prompts1.txt"
    prompts.write_text("A photo of an astronaut riding a horse on mars\n")
    prompts.chmod(0o640)
    words = (str(ROOT / "scripts" / "bench" / "plain_start.py"), str(pipeline), str(prompts))
    turns = [
        (_one_run(folder, pipeline, prompts), _plain(folder, *_TWO_RANKS, *words), _plain(folder, *words))
        for _ in range(repeat)
    ]
    runs, plain, alone = zip(*turns)
    told = [f"seconds from the command to the first forward, rank 0, median of {repeat}:"]
    told += [f"  {median(found[part] for found in runs):6.2f}  {part}" for part in _PARTS]
    in_all = [sum(ours[part] for part in _PARTS) for ours in runs]
    told.append(f"  {median(in_all):6.2f}  in all")
    others = {"a plain script that loads the pipeline and calls it": plain, "the same in one process": alone}
    for what, seconds in others.items():
        told.append(f"  {median(seconds):6.2f}  {what}; ours beside it: {median(map(truediv, in_all, seconds)):.2f}")
    told.append(f"modules in rank 0 at the first forward: {runs[-1]['modules']:.0f}")
    return [*told, *_imports(folder, pipeline, prompts)]


def _command(folder: Path, pipeline: Path, prompts: Path, *entry: str) -> list[str]:
    out = folder / "startup"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return [
        *python(*_TWO_RANKS, *entry, "flux"),
        *("--path", str(pipeline), "--prompt_path", str(prompts), *_FLAGS),
        *("--quant_weight_save_folder", str(out / "weights"), "--quant_dump_calib_folder", str(out / "dumps")),
    ]


def _one_run(folder: Path, pipeline: Path, prompts: Path) -> dict[str, float]:
    """Return the seconds of each part in one run, and the number of modules."""
    command = _command(folder, pipeline, prompts, str(ROOT / "scripts" / "bench" / "traced_rank.py"))
    out, start = folder / "startup", time.time()
    run(command, {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "BENCH_MARKS": str(out)})
    marks = {**_logged(out / "weights"), **json.loads((out / "rank0.json").read_text())}
    before, parts = start, {"modules": marks["modules"]}
    for part, mark in _PARTS.items():
        at = max(marks.get(mark, before), before)
        parts[part], before = at - before, at
    shutil.rmtree(out)
    return parts


def _plain(folder: Path, *words: str) -> float:
    """Return the seconds of the plain script, of its rank 0."""
    out, start = folder / "startup", time.time()
    out.mkdir(parents=True)
    run(python(*words), {"OMP_NUM_THREADS": "1", "BENCH_MARKS": str(out)})
    marks = json.loads((out / "rank0.json").read_text())
    shutil.rmtree(out)
    return marks["first forward"] - start


def _logged(weights: Path) -> Mapping[str, float]:
    """Return when each stage first began, and when the prompts were encoded: the line that says so comes behind it."""
    marks: dict[str, float] = {}
    for at, stage in begun(weights, 0):
        marks.setdefault(stage, at)
    return {**marks, **dict(zip(["encoded"], said(weights, 0, "encode:")))}


def _imports(folder: Path, pipeline: Path, prompts: Path) -> Iterator[str]:
    """Yield how many modules each rank imports, and the packages and trees that cost rank 0 most."""
    command = _command(folder, pipeline, prompts, "-m", "launcher")
    # torchrun writes what each rank prints into a file of its own.
    logs = folder / "startup" / "torchrun"
    place = command.index("--nproc_per_node=2") + 1
    command[place:place] = ["--log-dir", str(logs), "--redirects", "3"]
    environ = {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, check=True, capture_output=True)
    found = [_imported(next(logs.rglob(f"{rank}/stderr.log"))) for rank in range(2)]
    for rank, modules in enumerate(found):
        yield f"rank {rank} imports {len(modules)} modules in {sum(each.own for each in modules):.2f} s"
    yield "rank 0, a package's own time:"
    packages: dict[str, list[float]] = {}
    for each in found[0]:
        packages.setdefault(each.name.partition(".")[0], []).append(each.own)
    for name in sorted(packages, key=lambda name: -sum(packages[name]))[:_SHOWN]:
        yield f"  {sum(packages[name]):6.2f} s  {len(packages[name]):5} modules  {name}"
    yield f"rank 0, the {_SHOWN} most expensive imports with all that they import:"
    for each in sorted(found[0], key=lambda each: -each.all)[:_SHOWN]:
        yield f"  {each.all:6.2f} s  {each.name}"
    shutil.rmtree(folder / "startup")


class _Import(NamedTuple):
    """A module that was imported: seconds for itself, and with what it imported."""

    own: float
    all: float
    name: str


def _imported(log: Path) -> list[_Import]:
    lines = _IMPORT_LINE.findall(log.read_text())
    return [_Import(int(own) / 1e6, int(all_) / 1e6, name) for own, all_, name in lines]
