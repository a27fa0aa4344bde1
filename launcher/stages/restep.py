"""RESTEP: turn a published checkpoint's rows into those of other steps, from its own files, without the pipeline."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

from launcher.config.resolve import job_from_yaml
from launcher.files.fingerprint import Fingerprint
from launcher.files.folder_lock import hold
from launcher.files.manifest import Manifest, TimestepPolicy, read_manifest
from launcher.files.run_folder import CONFIG, MANIFEST, SMOOTHED
from launcher.files.shard_checks import check_contract
from launcher.files.shard_note import FileDigest
from launcher.files.smoothed_inputs import copy_smoothed
from launcher.stages.merge import say_published
from model_adapters import load_adapter
from model_adapters.pipeline.noise_levels import noise_levels
from quant_core.atomic_file import make_folder, write_text_atomically
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.checkpoint.resampling import SIGMAS_KEY, Levels, write_resampled
from quant_core.errors import InputError

# In the header of the tensors: the scheduler's settings, as JSON.
SCHEDULER_KEY = "scheduler"


def restep_files(folder: Path, steps: int, *, shift: float | None = None, to: Path | None = None) -> Path:
    """Publish a copy of a folder's checkpoint with the rows of that many steps, and return its folder.

    Raises InputError for a checkpoint that has no rows, does not say at which noise levels they were calibrated, or
    was calibrated at others than are wanted or changed since, and for a folder of the copy that holds a checkpoint.
    """
    source, job = folder.resolve(), uuid4().hex
    target = (to or source.with_name(f"{source.name}_{steps}steps")).resolve()
    _with_rows(source)  # before anything is made
    make_folder(target)
    # Nobody can work, or leave a lock, in a folder that is only read.
    reading = hold(source, "FOLDER", job) if os.access(source, os.W_OK) else nullcontext()
    with reading, hold(target, "--to", job):
        _require_free(target)
        copy = _write(source, _unchanged(source, _with_rows(source)), steps, shift, target)
    say_published(target, copy, print)
    return target


def _require_free(target: Path) -> None:
    if (target / MANIFEST).exists():
        raise InputError(
            "the folder of the copy holds a checkpoint",
            where=str(target / MANIFEST),
            why="a copy replaces none",
            advice="choose another folder with --to, or remove that checkpoint",
        )


def _unchanged(source: Path, manifest: Manifest) -> Manifest:
    """Return the manifest of files that are what was published: a copy would give others new digests."""
    if changed := manifest.changed_files(source):
        raise InputError(
            "the checkpoint was changed since it was published",
            where=str(source),
            why=f"missing, or of another content than {MANIFEST} says: {', '.join(changed)}",
            advice="run its job again, which makes what is damaged",
        )
    return manifest


def _write(source: Path, manifest: Manifest, steps: int, shift: float | None, target: Path) -> Manifest:
    """Write all files of the copy, its manifest last, and return that."""
    names = [file.name for file in manifest.files]
    shards = [open_checkpoint(CheckpointFiles(source / w, source / d)) for w, d in zip(names[::2], names[1::2])]
    levels, header = _levels(shards[0], manifest, steps, shift)
    assert shards[0].timestep_sep is not None, "a checkpoint with rows has a separator"
    separator = levels.separator(shards[0].timestep_sep)
    fields = manifest.fields | {
        "restep.of": manifest.fingerprint,
        **({} if shift is None else {"restep.shift": shift}),
        "pipeline.infer_steps": steps,
        "quantization.timestep_sep": separator,
    }
    header["fingerprint"] = digest = Fingerprint(fields).digest
    for shard in shards:
        files = CheckpointFiles(target / shard.files.weights.name, target / shard.files.description.name)
        write_resampled(shard, levels, files, header)
        check_contract(files)
    _write_job(source / CONFIG, steps, separator, target)
    copy_smoothed(source / SMOOTHED, manifest.fingerprint, target / SMOOTHED, digest)
    copy = manifest.model_copy(
        update={
            "files": [FileDigest.of(target / name) for name in names],
            "fields": fields,
            "fingerprint": digest,
            "timestep_policy": TimestepPolicy.of(steps, separator),
        }
    )
    copy.write(target / MANIFEST)
    return copy


def _write_job(source: Path, steps: int, separator: int, target: Path) -> None:
    """Say beside the copy which job it is of, where that of the checkpoint is known."""
    if not source.exists():
        return
    job = job_from_yaml(source.read_text(encoding="utf-8"))
    changed = {
        "pipeline": job.pipeline.model_copy(update={"infer_steps": steps}),
        "quantization": job.quantization.model_copy(update={"timestep_sep": separator}),
        "output": job.output.model_copy(update={"quant_weight_save_folder": target}),
    }
    write_text_atomically(target / CONFIG, job.model_copy(update=changed).to_yaml())


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
    checkpoint: Checkpoint, manifest: Manifest, steps: int, shift: float | None
) -> tuple[Levels, dict[str, str]]:
    """Return the old and the new noise levels, and what the header says of the new ones."""
    if SIGMAS_KEY not in checkpoint.metadata or SCHEDULER_KEY not in checkpoint.metadata:
        raise InputError(
            "the checkpoint does not say at which noise levels it was calibrated",
            where=str(checkpoint.files.weights),
            why=f"its header has no {SIGMAS_KEY}: an older version wrote it, its model has another kind of schedule, "
            "or its scheduler stays at a level for several steps",
            advice="quantize again with this version, which needs no new calibration, or calibrate with the steps that "
            "are wanted",
        )
    adapter = load_adapter(str(manifest.fields["model"]))
    settings: dict[str, Any] = json.loads(checkpoint.metadata[SCHEDULER_KEY])
    if shift is not None:
        settings |= {"shift": shift, "use_dynamic_shifting": False}
    given = {name: manifest.fields.get(f"pipeline.{name}") for name in adapter.options.model_fields}
    known = {name: value for name, value in given.items() if value is not None}
    options = adapter.options.model_validate({"path": "-", **known})
    new = noise_levels(adapter, settings, options, steps)
    if new is None:
        raise InputError(
            f"{steps} steps have no noise level each",
            where=str(checkpoint.files.weights),
            why=f"its scheduler, {settings.get('_class_name')}, stays at a level for several steps",
            advice="calibrate with the steps that are wanted",
        )
    header = {SIGMAS_KEY: json.dumps(new), SCHEDULER_KEY: json.dumps(settings)}
    return Levels(json.loads(checkpoint.metadata[SIGMAS_KEY]), new), header
