"""Run functions of test modules on real gloo ranks, several modules in one start: starting a rank costs seconds.

A test module that wants ranks has a function `on_each_rank(folder)`, which runs on every rank inside a process group
and writes what it found into the folder; the tests of the module read that.

Usage of each rank: `ranks.py FOLDER MODULE...`; each module gets the folder of its own name below FOLDER.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.forked_ranks import run_forked


def run_on_ranks(ranks: int, folder: Path, *modules: str) -> Path:
    """Run `on_each_rank` of each module on that many ranks of one start; returns the folder."""
    for module in modules:
        folder_of(folder, module).mkdir()
    done = run_forked(ranks, Path(__file__), folder, *modules, timeout_s=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def folder_of(folder: Path, module: str) -> Path:
    """Return where a module's results lie; pytest knows it without the packages in front."""
    return folder / module.rpartition(".")[2]


def main() -> None:
    """Join the gloo group of all ranks and run every module's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for module in sys.argv[2:]:
        import_module(module).on_each_rank(folder_of(Path(sys.argv[1]), module))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
