"""Show costs beside floors, as a table for a terminal or for a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from scripts.bench.cost import Cost

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Measured:
    """The costs of a row's repeats: each of ours beside the floor that ran right before it."""

    name: str
    pairs: Sequence[tuple[Cost, Cost]]

    def both(self, of: Callable[[Cost], float], form: str) -> str:
        """Return the medians of ours and the floor."""
        ours, floor = (median(of(pair[side]) for pair in self.pairs) for side in (0, 1))
        return f"{ours:{form}} / {floor:{form}}"

    def ratio(self, of: Callable[[Cost], float]) -> str:
        """Return the median ratio, and the least and the largest if they differ."""
        ratios = sorted(of(ours) / max(of(floor), 1e-3) for ours, floor in self.pairs)
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if f"{ratios[0]:.2f}" != f"{ratios[-1]:.2f}" else ""
        return f"{median(ratios):.2f}{spread}"


def _peak(measured: Measured) -> str:
    of_weights = [ours.peak_bytes / ours.weights_bytes for ours, _ in measured.pairs if ours.weights_bytes]
    above = f", {median(of_weights):.2f} x weights" if of_weights else ""
    return measured.both(lambda cost: cost.peak_bytes / GIB, ".2f") + above


# Column -> what stands in it; pairs are "ours / floor".
COLUMNS: dict[str, Callable[[Measured], str]] = {
    "job": lambda row: row.name,
    "cpu s": lambda row: row.both(lambda cost: cost.cpu_s, ".1f"),
    "x cpu": lambda row: row.ratio(lambda cost: cost.cpu_s),
    "wall s": lambda row: row.both(lambda cost: cost.wall_s, ".1f"),
    "x wall": lambda row: row.ratio(lambda cost: cost.wall_s),
    "peak GiB": _peak,
    "GB from disk": lambda row: row.both(lambda cost: cost.read_bytes / GB, ".1f"),
    "GB by read calls": lambda row: row.both(lambda cost: cost.called_bytes / GB, ".1f"),
    "GB to disk": lambda row: row.both(lambda cost: cost.written_bytes / GB, ".1f"),
}


def lines(rows: Sequence[Measured], *, markdown: bool) -> list[str]:
    """Return the table, its heading first."""
    cells = [list(COLUMNS), *([column(row) for column in COLUMNS.values()] for row in rows)]
    if markdown:
        cells.insert(1, ["---"] * len(COLUMNS))
        return [f"| {' | '.join(line)} |" for line in cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
