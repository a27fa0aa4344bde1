"""Whether the checkpoint that lies in a job's folder is another job's: what the job itself asks before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from launcher.config.job_config import JobConfig
from launcher.files.fingerprint import Fingerprint
from launcher.files.identity import calibration_fingerprint, quantization_fingerprint
from launcher.files.manifest import Manifest, another_jobs, read_manifest
from launcher.files.run_folder import MANIFEST
from launcher.ranks.mesh import Mesh
from launcher.stages.processors import disabled_layers_of
from model_adapters.adapter import ModelAdapter
from model_adapters.pipeline.prompts import Batch

# What a plan does not know: it digests nothing, and is often made without the number of ranks.
_FILES, _RANKS, _VERSIONS = "files.", "mesh.", "versions."


def what_lies_there(
    config: JobConfig,
    adapter: ModelAdapter,
    mesh: Mesh | None,
    batches: Sequence[Batch] | None,
    *,
    online: bool,
    ranks_are_said: bool,
) -> str:
    """Return what becomes of the checkpoint in the job's folder, empty where there is none.

    batches: None where they are not known. online: ranges are taken while calibrating.

    Raises InputError where it is another job's, and the job would be refused.
    """
    output, folder = config.output, config.output.quant_weight_save_folder
    assert folder is not None, "a job that quantizes has its folders"
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        return ""
    if not output.overwrite and mesh is not None and batches is not None:
        unknown = (_FILES,) if ranks_are_said else (_FILES, _RANKS)
        try:
            planned = _fields(config, adapter, mesh, batches, online=online)
        except PackageNotFoundError:  # this machine plans for one that has the device's packages
            there = config.model_copy(update={"ranks": config.ranks.model_copy(update={"device": "cpu"})})
            planned = {**_fields(there, adapter, mesh, batches, online=online), "ranks.device": config.ranks.device}
            unknown = (*unknown, _VERSIONS)
        _require_same(manifest, planned, unknown, folder)
    own = "made anew (--resume never)" if output.resume == "never" else "kept"
    other = "replaced (--overwrite)" if output.overwrite else "refused"
    return f"{folder} holds a published checkpoint: {own} if it is this job's, and {other} if not"


def _fields(
    config: JobConfig, adapter: ModelAdapter, mesh: Mesh, batches: Sequence[Batch], *, online: bool
) -> Mapping[str, Any]:
    disabled = disabled_layers_of(config.quantization, adapter)
    calibration = calibration_fingerprint(config, adapter, mesh, {}, batches)
    return quantization_fingerprint(calibration, config, disabled, online=online).fields


def _require_same(manifest: Manifest, planned: Mapping[str, Any], unknown: tuple[str, ...], folder: Path) -> None:
    ours, theirs = (
        {name: value for name, value in fields.items() if not name.startswith(unknown)}
        for fields in (planned, manifest.fields)
    )
    if differences := Fingerprint(ours).differences(theirs):
        raise another_jobs(folder / MANIFEST, differences)
