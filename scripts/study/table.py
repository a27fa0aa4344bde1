"""The study's results as markdown: one row a model and method, each figure with its spread over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure: its name in a cell, its heading, how many digits behind the point, what it is multiplied with."""

    name: str
    heading: str
    digits: int
    factor: float = 1.0

    def text(self, cells: Sequence[Cell]) -> str:
        """Write the mean over the cells' seeds and their standard deviation."""
        found = [self.factor * cell[self.name] for cell in cells if self.name in cell]
        if not found:
            return ""
        spread = f" ± {stdev(found):.{self.digits}f}" if len(found) > 1 else ""
        return f"{mean(found):.{self.digits}f}{spread}"


COLUMNS = (
    Column("median_layer", "layer, median", 1),
    Column("worst_layer", "layer, worst", 1),
    Column("output", "output", 1),
    Column("psnr", "PSNR", 1),
    Column("ssim", "SSIM", 4),
    Column("flip", "FLIP", 3),
    Column("right", "right, %", 0, 100),
)
METHOD = ("scheme", "smoothing", "estimator", "numerics")


def markdown(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of a table for each model, in the order of the cells."""
    for model in dict.fromkeys(cell["model"] for cell in cells):
        yield f"\n## {model}\n"
        yield _row(["scheme", "smoothing", "ranges", "numerics", *(column.heading for column in COLUMNS)])
        yield "|---" * 4 + "|--:" * len(COLUMNS) + "|"
        of_model = [cell for cell in cells if cell["model"] == model]
        for key in dict.fromkeys(tuple(cell[name] for name in METHOD) for cell in of_model):
            same = [cell for cell in of_model if tuple(cell[name] for name in METHOD) == key]
            yield _row([*key, *(column.text(same) for column in COLUMNS)])


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
