"""Measure the rows in memory on a card: in one process, which is warm.

A process on a card first loads the libraries' kernels, one by one, when each is first needed: seconds, for work of
one. So every row's job and floor run once before they count. What an allocator keeps is no matter here, because memory
is counted in what was asked of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.bench.cost import Cost
from scripts.bench.in_memory import MODEL, build, do_floor, do_job, measured, records
from scripts.bench.table import Measured


def measure(
    name: str, variant: str, folder: Path, repeat: int, device: str, shape: Mapping[str, Any] = MODEL
) -> Measured:
    """Run a variant's floor and job in turns, each on a model of its own; below a folder that is removed."""

    def cost(do: Callable[..., None]) -> Cost:
        folder.mkdir(parents=True)
        try:
            model, data = build(shape, device), records(shape, device)
            weights = sum(tensor.nbytes for tensor in model.state_dict().values())
            return Cost(**measured(lambda: do(model, data, variant, folder), weights, device))
        finally:
            shutil.rmtree(folder)

    pairs = []
    for _ in range(1 + repeat):
        floor = cost(do_floor)
        pairs.append((cost(do_job), floor))
    return Measured(name, pairs[1:])
