"""Collect what the results of a job depend on, as the fields of its fingerprints.

A dump depends on the model, the prompts, how the pipeline runs and how the model is divided; a shard depends on all
of that and on the quantization. Devices and versions count too: another kernel may move a last bit, and then ranks
would no longer fit together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.config.job_config import JobConfig
from launcher.files.fingerprint import Fingerprint, digest_of_file, digest_of_text, flatten
from launcher.ranks.mesh import Mesh
from model_adapters.adapter import ModelAdapter
from model_adapters.pipeline.prompts import Batch
from model_adapters.weights.model_folder import pipeline_folder, read_json
from model_adapters.weights.transformer_folders import WHOLE, all_files, divided_folders, used_folders

_PACKAGES = ("torch", "diffusers", "transformers")
# What a copy of the same model may say differently of itself.
_VOLATILE = {"_diffusers_version", "_name_or_path", "transformers_version"}


def model_fields(config: JobConfig) -> dict[str, Any]:
    """Describe the float model by content: reads every weight of the transformer once, so ask on one rank only.

    The other parts of the pipeline are described by their configurations and by the names and sizes of their files.
    """
    folder = pipeline_folder(config.pipeline.path)
    files, used, transformers = all_files(folder), used_folders(folder), {folder / WHOLE, *divided_folders(folder)}
    describe = digest_of_file if config.output.fingerprint == "content" else _stat
    return {
        "config": {
            str(path.relative_to(folder)): digest_of_text(repr(sorted(_stable(read_json(path)))))
            for path in sorted(folder.glob("*/*config.json"))
            if path.parent in used or path.parent not in transformers
        },
        "weights": {str(file.relative_to(folder)): describe(file) for file in files},
        "other_files": digest_of_text(repr(list(_names_and_sizes(folder, leave_out=transformers)))),
    }


def calibration_fingerprint(
    config: JobConfig, adapter: ModelAdapter, mesh: Mesh, model: dict[str, Any], batches: Iterable[Batch]
) -> Fingerprint:
    """Return what this job's dumps depend on.

    model: what `model_fields` returned. batches: those of all copies of the model.
    """
    plan = adapter.shard_plan(config.ranks.layout)
    requests = [asdict(request) for batch in batches for request in batch]
    tree = {
        "model": {"name": config.model, **model},
        "prompts": {"count": len(requests), "digest": digest_of_text(repr(requests))},
        "pipeline": config.pipeline.model_dump(mode="json", exclude=set(config.pipeline.OUTSIDE_IDENTITY)),
        "dtype": str(adapter.dtype(config.pipeline)),
        "layout": {"name": plan.name, "version": plan.version},
        "mesh": {"world": mesh.world, "tp_size": mesh.tp_size},
        "device": config.ranks.device,
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return Fingerprint(flatten(tree))


def quantization_fingerprint(
    calibration: Fingerprint, config: JobConfig, disabled_layers: Sequence[str]
) -> Fingerprint:
    """Return what this job's shards depend on; disabled_layers: the patterns that were chosen or are the recipe's."""
    options = config.quantization.model_dump(mode="json", exclude={"do_quant", "disable_names"})
    options["disable_names"] = list(disabled_layers)
    return Fingerprint({**calibration.fields, **flatten({"quantization": options})})


def _stable(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, repr(value)) for key, value in config.items() if key not in _VOLATILE]


def _stat(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} bytes, modified {status.st_mtime_ns}"


def _names_and_sizes(folder: Path, *, leave_out: set[Path]) -> Iterable[tuple[str, int]]:
    for path in sorted(folder.glob("*/*")):
        if path.is_file() and path.parent not in leave_out:
            yield str(path.relative_to(folder)), path.stat().st_size
