"""Draw a report as HTML, Markdown and JSON, and publish them beside the checkpoint."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from launcher.files.run_folder import DATA, PAGES, QUALITY
from launcher.journal.console import format_seconds
from launcher.report.content import Report
from launcher.report.drawing import errors, ranges, timeline
from launcher.report.spreads import spread_chart
from model_adapters.quality.results import SHEET
from quant_core.atomic_file import write_text_atomically


def write_report(report: Report, folder: Path, output: Path) -> list[Path]:
    """Publish the report in `output`; `folder` is the checkpoint's, where the pictures are. Returns the files."""
    written = [write_text_atomically(output / name, page(report, name, folder, output)) for name in PAGES]
    return [*written, write_text_atomically(output / DATA, report.model_dump_json(indent=1) + "\n")]


def page(report: Report, name: str, folder: Path, output: Path) -> str:
    """Return one page as text."""
    sheet = folder / QUALITY / SHEET
    template = _templates().get_template(name)
    return template.render(
        report=report,
        worst_first=sorted(report.layers, key=lambda layer: (layer.sqnr is None, layer.sqnr or 0.0)),
        errors=errors(report.layers, report.timestep_sep),
        ranges=ranges(report.layers, report.timestep_sep),
        smoothed=sorted((layer for layer in report.layers if layer.factors), key=lambda layer: layer.factors or ()),
        spreads=spread_chart(report.smoothed_inputs),
        timeline=timeline(report.stages),
        sheet=_picture(sheet) if report.verdict else None,
        sheet_name=os.path.relpath(sheet, output),
    )


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("launcher.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "duration": format_seconds,
        "gib": lambda count: f"{count / 2**30:.2f}",
        "db": _decibels,
        "figure": _figure,
    }
    return templates


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _figure(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value} {unit}"


def _picture(path: Path) -> str | None:
    """Return a PNG as an address that holds all of it, so that the page needs no other file."""
    if not path.exists():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
