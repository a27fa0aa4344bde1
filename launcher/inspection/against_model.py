"""Compare a checkpoint with the float model it was made of: layer by layer, without holding either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from launcher.config.resolve import job_from_yaml
from launcher.files.run_folder import CONFIG
from launcher.inspection.manifest_rules import is_fused
from launcher.inspection.published import Published, RankCheckpoint
from model_adapters.weights.brought import NOTHING, Brought
from model_adapters.weights.transformer_part import TransformerPart, describe_transformer
from quant_core.checkpoint.findings import Finding
from quant_core.checkpoint.loading import misfits
from quant_core.errors import InputError
from quant_core.quality.ratio import Ratio, compare

# Codes of 8 bits keep 35 to 45 dB of a weight; of another layer's weight they keep nothing.
_LEAST_DB = 10.0


@dataclass
class Comparison:
    """Say what differs, and how much each layer's weight lost: signal and noise, added up over the ranks."""

    findings: list[Finding] = field(default_factory=list)
    layers: dict[str, Ratio] = field(default_factory=dict)


def compare_with_model(published: Published, path: str) -> Comparison:
    """Compare every rank with its part of the model in a pipeline folder.

    Raises InputError when nobody can say which model that is, or the folder is not whole.
    """
    adapter, manifest = published.adapter, published.manifest
    if adapter is None or manifest is None:
        raise InputError(
            "nobody can say of which model the checkpoint is",
            where=str(published.folder),
            why="the manifest names the model and its layout, and it is missing or names one that is not installed",
            advice="leave out --path, or give the folder as the job published it",
        )
    found, brought = Comparison(), _brought(published.folder / CONFIG)
    for rank in published.ranks:
        part = describe_transformer(
            adapter,
            path,
            tp_rank=rank.rank,
            tp_size=len(published.ranks),
            layout=manifest.layout,
            dtype=rank.inventory.dtype,
            brought=brought,
        )
        misfit = list(misfits(part.model, rank.checkpoint))
        found.findings += misfit
        for layer, ratio in _layers(rank, part, {finding.tensor for finding in misfit}).items():
            found.layers[layer] = found.layers.get(layer, Ratio()) + ratio
            if ratio.decibels < _LEAST_DB and not is_fused(manifest):
                what = f"'{layer}' is {ratio.decibels:.1f} dB from the model's weight"
                why = f"quantizing loses less: it is another weight (below {_LEAST_DB:.0f} dB)"
                found.findings.append(Finding("the model's weights", rank.files.weights, f"{layer}.weight", what, why))
        found.findings += _changed(rank, part, is_fused(manifest))
    return found


def _layers(rank: RankCheckpoint, part: TransformerPart, without: set[str]) -> Mapping[str, Ratio]:
    """Return signal and noise of each layer's weight on a rank, against the model's, rotated as the layer was."""
    names = [name for name in rank.inventory.layers if name not in without]
    return {name: compare(_of_model(rank, part, f"{name}.weight"), rank.checkpoint.read_weight(name)) for name in names}


def _of_model(rank: RankCheckpoint, part: TransformerPart, name: str) -> Tensor:
    """Return the model's tensor in the dtype of the run, rotated if its layer was."""
    (layer, _, tensor), value = name.rpartition("."), part.read(name).to(rank.inventory.dtype)
    rotation = rank.checkpoint.rotations.get(layer)
    return value if rotation is None else rotation.tensor(tensor, value)


def _brought(job: Path) -> Brought:
    """Return the files that the job read beside the pipeline folder: the checkpoint was made of them too."""
    return Brought.of(job_from_yaml(job.read_text(encoding="utf-8")).pipeline) if job.exists() else NOTHING


def _changed(rank: RankCheckpoint, part: TransformerPart, fused: bool) -> Iterator[Finding]:
    """Yield tensors that quantizing leaves alone, and that are not the model's."""
    rotations = rank.checkpoint.rotations
    kept = {name: (name, "the runtime never loads it, so a change would be lost") for name in rank.inventory.floats}
    for name, group in rank.inventory.layers.items() if not fused else ():
        if "bias" in group.members:
            kept[f"{name}.bias"] = group.members["bias"], "quantizing a weight leaves its bias alone"
    for name, (full, why) in kept.items():
        if name not in part.stored:
            continue
        ours = rank.checkpoint.read_raw(full)
        theirs = _of_model(rank, part, name).to(ours.dtype)
        if ours.shape == theirs.shape and not _is_same(ours, theirs, name.rpartition(".")[0] in rotations):
            yield Finding("the model's tensors", rank.files.weights, full, f"'{full}' is not the model's", why)


def _is_same(stored: Tensor, ours: Tensor, rotated: bool) -> bool:
    """Compare bit by bit; what was rotated on another kind of device may be rounded to the neighbour."""
    if not rotated:
        return torch.equal(stored, ours)
    eps, largest = torch.finfo(ours.dtype).eps, float(ours.abs().max())
    return torch.allclose(stored.double(), ours.double(), rtol=eps, atol=eps * largest)
