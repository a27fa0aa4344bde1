"""Drawings of a report, as the numbers that SVG takes: nothing here knows colours or words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from launcher.report.layers import LayerRow
from launcher.report.running import StageRow

# Where one shade ends and the next begins, in dB: 6 dB are one bit.
SHADES_DB = (10, 16, 22, 28, 34, 40, 46)
# The same for ranges, as shares of a layer's widest: a range of half the width wastes one bit of a scale for all steps.
SHADES_RANGE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
# The width of a timeline, and the height of a line of text.
_WIDTH, _LINE_HEIGHT = 1000.0, 15


@dataclass(frozen=True)
class HeatMap:
    """A cell for each layer (down) and step (right), as one path a shade; a cell is 1 by 1."""

    steps: Sequence[int]
    layers: Sequence[str]
    paths: Sequence[str]
    separator: int | None
    shades: tuple[float, ...]

    @property
    def cell_height(self) -> int:
        """Return how many pixels high a cell is: fewer where there are many layers."""
        return max(2, min(16, 900 // len(self.layers)))

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Return the first row of each block of layers, with the block's name, where names have room."""
        starts: dict[str, int] = {}
        for row, name in enumerate(self.layers):
            starts.setdefault(".".join(name.split(".")[:2]), row)
        kept: list[tuple[str, int]] = []
        for name, row in starts.items():
            if not kept or (row - kept[-1][1]) * self.cell_height >= _LINE_HEIGHT:
                kept.append((name, row))
        return kept


def errors(layers: Sequence[LayerRow], timestep_sep: int | None) -> HeatMap | None:
    """Return the heat map of the layers whose error was measured by step, in model order; None without any."""
    return _heat_map({layer.name: layer.steps for layer in layers}, SHADES_DB, timestep_sep)


def ranges(layers: Sequence[LayerRow], timestep_sep: int | None) -> HeatMap | None:
    """Return the heat map of the layers that have a static range for each step; None without any."""
    return _heat_map({layer.name: layer.ranges for layer in layers}, SHADES_RANGE, timestep_sep)


def _heat_map(
    figures: Mapping[str, Mapping[int, float]], limits: tuple[float, ...], timestep_sep: int | None
) -> HeatMap | None:
    rows = {name: by_step for name, by_step in figures.items() if by_step}
    if not rows:
        return None
    steps = sorted({step for by_step in rows.values() for step in by_step})
    paths: dict[int, list[str]] = {shade: [] for shade in range(len(limits) + 1)}
    for y, by_step in enumerate(rows.values()):
        for shade, x, length in _runs([_shade(by_step.get(step), limits) for step in steps]):
            paths[shade].append(f"M{x} {y}h{length}v1h-{length}z")
    separator = next((x for x, step in enumerate(steps) if step == timestep_sep), None)
    return HeatMap(steps, list(rows), ["".join(path) for path in paths.values()], separator, limits)


@dataclass(frozen=True)
class Bar:
    """A stage in a rank's track, in thousandths of the whole time."""

    stage: StageRow
    x: float
    width: float
    shade: int


@dataclass(frozen=True)
class Timeline:
    """A track of bars for each rank."""

    seconds: float
    tracks: Mapping[int, Sequence[Bar]] = field(default_factory=dict)


def timeline(stages: Sequence[StageRow]) -> Timeline | None:
    """Return the tracks of all ranks on one scale; None without stages."""
    if not stages:
        return None
    whole = max(stage.begin + stage.seconds for stage in stages) or 1.0
    shades = {name: shade for shade, name in enumerate(dict.fromkeys(stage.stage for stage in stages))}
    tracks: dict[int, list[Bar]] = {}
    for stage in stages:
        x, width = _WIDTH * stage.begin / whole, _WIDTH * stage.seconds / whole
        tracks.setdefault(stage.rank, []).append(Bar(stage, round(x, 1), round(width, 1), shades[stage.stage]))
    return Timeline(whole, tracks)


def _shade(figure: float | None, limits: Sequence[float]) -> int | None:
    return None if figure is None else sum(figure >= limit for limit in limits)


def _runs(shades: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
    """Return shade, first column and length of each run of equal cells."""
    x = 0
    for shade, cells in groupby(shades):
        length = len(list(cells))
        if shade is not None:
            yield shade, x, length
        x += length
