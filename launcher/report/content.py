"""What a report says, as data: gathered from what a job left in its output folder, and nothing is measured.

It holds what `report.json` holds; the pages are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.files.manifest import Manifest, read_manifest
from launcher.files.run_folder import MANIFEST, QUALITY, SMOOTHED
from launcher.files.smoothed_inputs import InputSpread, read_smoothed
from launcher.report.layers import LayerRow, ScopeRow, layer_rows, scope_rows
from launcher.report.running import OptionRow, StageRow, command, option_rows, stage_rows
from model_adapters.quality.card import QualityCard, read_card
from model_adapters.quality.results import CARD
from model_adapters.quality.verdict import verdict
from quant_core.errors import InputError


class FileRow(BaseModel):
    """A published file."""

    name: str
    bytes: int
    sha256: str


class Report(BaseModel):
    """Hold all that a report says of one checkpoint; what the folder does not tell is empty."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    model: str
    quant_type: str
    layout: str
    tp_size: int
    dp_size: int
    fingerprint: str
    verdict: list[str]
    scope: list[ScopeRow]
    layers: list[LayerRow]
    smoothed_inputs: list[InputSpread] = []
    timestep_sep: int | None
    registration: dict[str, str]
    stages: list[StageRow]
    options: list[OptionRow]
    command: str
    versions: dict[str, str]
    files: list[FileRow]


def gather(folder: Path) -> Report:
    """Read what a job left in its output folder.

    Raises InputError where nothing is published, or a file of it cannot be read.
    """
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        raise InputError(
            "there is no published checkpoint to report on",
            where=str(folder / MANIFEST),
            why="a job writes this file last, so it did not finish, or the folder is another one",
            advice="give the --quant_weight_save_folder of a finished job; status.json there says how one ended",
        )
    card = _card(folder / QUALITY / CARD, manifest)
    policy, fields = manifest.timestep_policy, manifest.fields
    options, model = option_rows(folder)
    layers, world = layer_rows(folder, manifest, card), manifest.tp_size * manifest.dp_size
    return Report(
        model=model,
        quant_type=manifest.quant_type,
        layout=manifest.layout,
        tp_size=manifest.tp_size,
        dp_size=manifest.dp_size,
        fingerprint=manifest.fingerprint,
        verdict=verdict(card) if card else [],
        scope=scope_rows(layers),
        layers=layers,
        smoothed_inputs=list(read_smoothed(folder / SMOOTHED, manifest.fingerprint)),
        timestep_sep=policy.timestep_sep if policy else None,
        registration=policy.registration if policy else {},
        stages=stage_rows(folder, world),
        options=options,
        command=command(folder, model, world),
        versions=_versions(fields),
        files=[FileRow(**file.model_dump()) for file in manifest.files],
    )


def _card(path: Path, manifest: Manifest) -> QualityCard | None:
    """Return the quality card, if there is one, and it is of this checkpoint."""
    if not path.exists():
        return None
    card = read_card(path)
    return card if card.origin.fingerprint == manifest.fingerprint else None


def _versions(fields: Mapping[str, object]) -> dict[str, str]:
    prefix = "versions."
    return {name.removeprefix(prefix): str(value) for name, value in fields.items() if name.startswith(prefix)}
