"""RESTEP: turn a published checkpoint's rows into those of other steps, from its own files, without the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.files.fingerprint import Fingerprint
from launcher.files.manifest import Manifest, TimestepPolicy, read_manifest
from launcher.files.run_folder import MANIFEST
from launcher.files.shard_note import FileDigest
from launcher.stages.merge import report
from model_adapters import load_adapter
from model_adapters.pipeline.noise_levels import noise_levels
from quant_core.atomic_file import make_folder
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.checkpoint.resampling import SIGMAS_KEY, Levels, write_resampled
from quant_core.errors import InputError

# In the header of the tensors: the scheduler's settings, as JSON.
SCHEDULER_KEY = "scheduler"


def restep_files(folder: Path, steps: int, *, shift: float | None = None, to: Path | None = None) -> Path:
    """Publish a copy of a folder's checkpoint with the rows of that many steps, and return its folder.

    Raises InputError for a checkpoint that has no rows, does not say at which noise levels they were calibrated, or
    was calibrated at others than are wanted.
    """
    manifest = _with_rows(folder)
    target = to or folder.with_name(f"{folder.name}_{steps}steps")
    make_folder(target)
    names, separator = [file.name for file in manifest.files], 0
    for weights, description in zip(names[::2], names[1::2]):
        checkpoint = open_checkpoint(CheckpointFiles(folder / weights, folder / description))
        levels, header = _levels(checkpoint, manifest, steps, shift, folder / weights)
        separator = write_resampled(checkpoint, levels, CheckpointFiles(target / weights, target / description), header)
    fields = manifest.fields | {"pipeline.infer_steps": steps} | ({} if shift is None else {"restep.shift": shift})
    copy = manifest.model_copy(
        update={
            "files": [FileDigest.of(target / name) for name in names],
            "fields": fields,
            "fingerprint": Fingerprint(fields).digest,
            "timestep_policy": TimestepPolicy.of(steps, separator),
        }
    )
    copy.write(target / MANIFEST)
    report(target, copy, print)
    return target


def _with_rows(folder: Path) -> Manifest:
    manifest = read_manifest(folder / MANIFEST)
    if manifest is not None and manifest.timestep_policy is not None and not _is_reference(manifest):
        return manifest
    if manifest is None:
        what, why = "nothing is published there", f"there is no {MANIFEST}"
    elif manifest.timestep_policy is None:
        what, why = "the checkpoint has no rows for steps", "none of its layers is w8a8_timestep"
    else:
        what, why = "its rows are the reference tool's", "they are running means over steps, and not ranges of a level"
    raise InputError(what, where=str(folder), why=why, advice="give the folder of a w8a8_timestep checkpoint")


def _is_reference(manifest: Manifest) -> bool:
    return manifest.fields.get("quantization.numerics") == "reference"


def _levels(
    checkpoint: Checkpoint, manifest: Manifest, steps: int, shift: float | None, where: Path
) -> tuple[Levels, dict[str, str]]:
    """Return the old and the new noise levels, and what the header says of the new ones."""
    if SIGMAS_KEY not in checkpoint.metadata or SCHEDULER_KEY not in checkpoint.metadata:
        raise InputError(
            "the checkpoint does not say at which noise levels it was calibrated",
            where=str(where),
            why=f"its header has no {SIGMAS_KEY}: an older version wrote it, or its model has another kind of schedule",
            advice="quantize again with this version, which needs no new calibration",
        )
    adapter = load_adapter(str(manifest.fields["model"]))
    settings: dict[str, Any] = json.loads(checkpoint.metadata[SCHEDULER_KEY])
    if shift is not None:
        settings |= {"shift": shift, "use_dynamic_shifting": False}
    given = {name: manifest.fields.get(f"pipeline.{name}") for name in adapter.options.model_fields}
    known = {name: value for name, value in given.items() if value is not None}
    options = adapter.options.model_validate({"path": "-", **known})
    new = noise_levels(adapter, settings, options, steps)
    assert new is not None, "the header has levels of a model that sets timesteps"
    header = {SIGMAS_KEY: json.dumps(new), SCHEDULER_KEY: json.dumps(settings)}
    return Levels(json.loads(checkpoint.metadata[SIGMAS_KEY]), new), header
