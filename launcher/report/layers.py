"""The layers of a checkpoint: what became of each, how well, and which of them go together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from launcher.config.job_config import AUTO
from launcher.files.manifest import Manifest
from model_adapters.quality.card import QualityCard
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.tensor_parts import TensorFiles
from quant_core.naming import matches
from quant_core.schemes.treatment import FLOAT as KEPT
from quant_core.schemes.treatment import Treatment

FLOAT = "FLOAT"
_WEIGHT, _RANGE, _FACTORS = ".weight", ".input_scale", ".div.mul_scale"


class LayerRow(BaseModel):
    """A linear layer: its scheme, the shape of its weight on the first rank, and how far it is from its float self.

    sqnr: in dB, None where it was not measured; steps: the same by denoising step. ranges: the static range of the
    inputs by denoising step, as a share of the widest. factors: the least and the most that smoothing multiplies a
    channel of the inputs by; both are of the first rank.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    is_smoothed: bool = False
    why_float: str = ""
    sqnr: float | None = None
    steps: dict[int, float] = {}
    ranges: dict[int, float] = {}
    factors: tuple[float, float] | None = None


class ScopeRow(BaseModel):
    """Layers whose names differ in numbers only."""

    pattern: str
    count: int
    scheme: str
    why_float: str
    worst: float | None


def layer_rows(folder: Path, manifest: Manifest, card: QualityCard | None) -> list[LayerRow]:
    """Return the linear layers in the order of the description of the first rank."""
    weights, description = (folder / file.name for file in manifest.files[:2])
    types = read_object(description)
    measured = {layer.name: layer for layer in card.layers} if card else {}
    rows = list(_linears(types, TensorFiles(weights)))
    for row in rows:
        if row.scheme == FLOAT:
            row.why_float = why_float(row.name, manifest.fields, is_last=row is rows[-1])
        if found := measured.get(row.name):
            row.sqnr, row.steps = found.sqnr, dict(found.steps)
    return rows


def scope_rows(layers: Sequence[LayerRow]) -> list[ScopeRow]:
    """Return the layers by the patterns of their names, in their order."""
    groups: dict[tuple[str, str, str], list[LayerRow]] = {}
    for layer in layers:
        groups.setdefault((re.sub(r"\d+", "*", layer.name, count=1), layer.scheme, layer.why_float), []).append(layer)
    return [
        ScopeRow(
            pattern=pattern,
            count=len(group),
            scheme=scheme,
            why_float=why,
            worst=min((layer.sqnr for layer in group if layer.sqnr is not None), default=None),
        )
        for (pattern, scheme, why), group in groups.items()
    ]


def _linears(types: Mapping[str, str], weights: TensorFiles) -> Iterator[LayerRow]:
    """Return what the files say of each layer with a matrix; a smoothed one is called `L.linear` there."""
    infos = weights.infos()
    for key, scheme in types.items():
        if not key.endswith(_WEIGHT) or key not in infos or len(infos[key].shape) != 2:
            continue
        owner = key.removesuffix(_WEIGHT)
        layer = owner.removesuffix(".linear")
        is_smoothed = layer != owner and f"{layer}{_FACTORS}" in types
        out_features, in_features = infos[key].shape
        row = LayerRow(name=layer if is_smoothed else owner, scheme=scheme, shape=(out_features, in_features))
        if is_smoothed:
            low, high = weights.read(f"{layer}{_FACTORS}").float().aminmax()
            row.is_smoothed, row.factors = True, (_figure(low), _figure(high))
        if (scale := f"{owner}{_RANGE}") in infos and infos[scale].shape[0] > 1:
            shares = (by_step := weights.read(scale).float().flatten()) / by_step.max()
            row.ranges = {step: _figure(share) for step, share in enumerate(shares)}
        yield row


def _figure(value: Any) -> float:
    """Return a number with as many digits as anybody reads, which keeps the files small."""
    return float(f"{float(value):.3g}")


def why_float(name: str, fields: Mapping[str, Any], *, is_last: bool) -> str:
    """Return why a layer stayed float, by what the manifest says of the job; empty where that says nothing of it."""
    rules = fields.get("quantization.layer_schemes") or ()
    chosen = [pattern for pattern, scheme in rules if Treatment.of(scheme).scheme == KEPT and matches(name, pattern)]
    kept = [pattern for pattern in fields.get("quantization.disable_names") or () if matches(name, pattern)]
    if chosen or kept:
        return f"kept float by {(chosen or kept)[0]}"
    if is_last:
        return "the last linear stays float"
    return "chosen by measurement" if fields.get("quantization.quant_type") == AUTO else ""
