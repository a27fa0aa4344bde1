"""Collect what the results of a job depend on, as the fields of its fingerprints.

A dump depends on the model, the prompts, how the pipeline runs and how the model is divided; a shard depends on all
of that and on the quantization. Devices and versions count too: another kernel may move a last bit, and then ranks
would no longer fit together.

Everything in the configuration counts but what is named here (and by the model's options) as being outside: an option
that nobody thought of separates two jobs that could have shared a dump, and never joins two that could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.config.job_config import Evaluation, JobConfig
from launcher.devices.host_memory import fits_in_memory
from launcher.devices.kinds import KINDS
from launcher.files.digests import digest_of_file, digest_of_text
from launcher.files.fingerprint import Fingerprint, flatten
from launcher.ranks.mesh import Mesh
from model_adapters import announced_version
from model_adapters.adapter import ModelAdapter
from model_adapters.pipeline.prompts import Batch
from model_adapters.weights.brought import Brought
from model_adapters.weights.model_folder import pipeline_folder, read_json
from model_adapters.weights.transformer_folders import pipeline_files
from quant_core.values import VALUES_VERSION

# Digesting waits for a processor as often as for the disk (three files of a model of 24 GB: 14 s, one by one 17).
_FILES_AT_ONCE = 3
_PACKAGES = ("torch", "diffusers", "transformers")
# What a copy of the same model may say differently of itself.
_VOLATILE = {"_diffusers_version", "_name_or_path", "transformers_version"}
# Options that a host may have otherwise than another: where things are, and which card is used.
_OF_A_HOST = {
    "pipeline": {"path", "transformer", "lora", "prompt_path", "info_file_save_path"},
    "ranks": {"device_id"},
    "output": {"save_path", "quant_weight_save_folder", "quant_dump_calib_folder"},
    "evaluation": {"evaluate_prompts"},
}
# By section, the options that cannot change a tensor, or are known by what they lead to: the mesh, the shard plan, the
# layers that stay float, where ranges come from. Those of the section `pipeline` are the model's:
# `PipelineOptions.OUTSIDE_IDENTITY`.
OUTSIDE_IDENTITY: Mapping[str, frozenset[str]] = {
    "quantization": frozenset({"do_quant", "disable_names"}),
    "ranks": frozenset({"device_id", "tp_size", "layout", "timeout_s", "hang_timeout"}),
    "output": frozenset(
        {"save_path", "do_save_img", "quant_weight_save_folder", "quant_dump_calib_folder"}
        | {"calibrate", "no_dump", "resume", "fingerprint", "overwrite", "dry_run"}
    ),
    "evaluation": frozenset(Evaluation.model_fields),
}


def common_options(config: JobConfig) -> dict[str, Any]:
    """Return the options that all ranks of a job must have alike."""
    return flatten(config.model_dump(mode="json", exclude=_OF_A_HOST))


def model_fields(config: JobConfig, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Describe the float model by the content of the files that a job reads of it: one of several shares of them.

    The shares of all ranks are the whole. A job that asks for it describes the large files by size and time.
    """
    folder, brought = pipeline_folder(config.pipeline.path, config.pipeline.variant), Brought.of(config.pipeline)
    files = {str(path.relative_to(folder)): path for path in pipeline_files(folder, brought)}
    if brought.transformer is not None:
        files["--transformer"] = brought.transformer
    scales = {f"--lora {number}": f" x {lora.scale}" for number, lora in enumerate(brought.loras)}
    files |= {name: lora.path for name, lora in zip(scales, brought.loras, strict=True)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    content = partial(digest_of_file, passing=not fits_in_memory(sum(sizes.values())))
    describe = content if config.output.fingerprint == "content" else _stat
    mine = _shares(sizes, shares)[share]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        described = threads.map(lambda name: _describe(files[name], describe), mine)
        return {name: text + scales.get(name, "") for name, text in zip(mine, described, strict=True)}


def _shares(sizes: Mapping[str, int], shares: int) -> list[list[str]]:
    """Divide files of these sizes into shares of about equal size: the largest first, each to who has least."""
    divided: list[list[str]] = [[] for _ in range(shares)]
    taken = [0] * shares
    for size, name in sorted(((size, name) for name, size in sizes.items()), reverse=True):
        least = taken.index(min(taken))
        divided[least].append(name)
        taken[least] += size
    return divided


def calibration_fingerprint(
    config: JobConfig, adapter: ModelAdapter, mesh: Mesh, model: Mapping[str, Any], batches: Iterable[Batch]
) -> Fingerprint:
    """Return what this job's dumps depend on.

    model: what `model_fields` returned. batches: those of all copies of the model.
    """
    plan, packages = adapter.shard_plan(config.ranks.layout), (*_PACKAGES, *KINDS[config.ranks.device].packages)
    requests = [asdict(request) for batch in batches for request in batch]
    options = _options(config)
    del options["quantization"]
    tree = {
        **options,
        "files": model,
        "prompts": {"count": len(requests), "digest": digest_of_text(repr(requests))},
        "dtype": str(adapter.dtype(config.pipeline)),
        "layout": {"name": plan.name, "version": plan.version},
        "mesh": {"world": mesh.world, "tp_size": mesh.tp_size},
        "versions": {package: version(package) for package in packages} | announced_version(config.model),
    }
    return Fingerprint(flatten(tree))


def quantization_fingerprint(
    calibration: Fingerprint, config: JobConfig, disabled_layers: Sequence[str], *, online: bool = False
) -> Fingerprint:
    """Return what this job's shards depend on.

    disabled_layers: the patterns that were chosen or are the recipe's. online: ranges are the float model's.
    """
    options = {**_options(config)["quantization"], "disable_names": list(disabled_layers), "version": VALUES_VERSION}
    if online:
        options["ranges"] = "online"
    # A list, because the order of the patterns counts; left out where there are none.
    if rules := options.pop("layer_schemes"):
        options["layer_schemes"] = [[pattern, scheme] for pattern, scheme in rules.items()]
    return Fingerprint({**calibration.fields, **flatten({"quantization": options})})


def image_fingerprint(model: Fingerprint, config: JobConfig) -> Fingerprint:
    """Return what images of a model depend on, quantized or float: their steps may be approximated, a dump's never."""
    return Fingerprint({**model.fields, "approximation": config.pipeline.approximation})


def _options(config: JobConfig) -> dict[str, Any]:
    outside = {"pipeline": config.pipeline.OUTSIDE_IDENTITY, **OUTSIDE_IDENTITY}
    return config.model_dump(mode="json", exclude={section: set(names) for section, names in outside.items()})


def _describe(path: Path, describe: Any) -> str:
    if path.name.endswith("config.json") or path.name == "model_index.json":
        stable = [(key, repr(value)) for key, value in read_json(path).items() if key not in _VOLATILE]
        return digest_of_text(repr(sorted(stable)))
    return describe(path) if path.suffix == ".safetensors" else digest_of_file(path)


def _stat(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} bytes, modified {status.st_mtime_ns}"
