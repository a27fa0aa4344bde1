"""What a table is to be made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from scripts.study.subject import STEPS, Subject, model_folder

# float16, SD3's own, takes a processor three times as long, and the error of int8 hides what they differ by.
_DTYPES = {"sd3": torch.float32}


@dataclass(frozen=True)
class Asked:
    """Say which models and seeds to measure, with how many pictures, and where models and pictures lie."""

    work: Path
    models: Sequence[str]
    seeds: Sequence[int]
    pictures: int

    def subject(self, model: str, seed: int, steps: int = STEPS) -> Subject:
        """Return one model and seed, to be run in so many steps."""
        folder = self.work / model.replace(", ", "_") / f"{seed}_{steps}"
        kind, path = model.partition(",")[0], model_folder(model, self.work)
        return Subject(kind, path, seed, self.pictures, folder, steps=steps, dtype=_DTYPES.get(kind))


def mean_and_error(values: Sequence[float]) -> str:
    """Write the mean and its standard error, of one value the value."""
    if len(values) < 2:
        return f"{mean(values):.2f}"
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"
