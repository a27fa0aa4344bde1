"""IDENTIFY: find out what the job's results depend on, where they go, and whether they are there already.

What a rank alone could see otherwise than the others (its options, its host's files and versions) is compared first:
ranks of different jobs would wait for each other, or fit together by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from launcher.config.job_config import JobConfig
from launcher.failure.phases import run_together
from launcher.files.fingerprint import Fingerprint
from launcher.files.identity import calibration_fingerprint, model_fields, quantization_fingerprint
from launcher.files.manifest import another_jobs, read_manifest
from launcher.files.run_folder import RunFolder
from launcher.ranks.agreement import gather_objects, require_alike
from launcher.ranks.process_group import Ranks
from launcher.stages.job import Job, Results
from launcher.stages.quantize import quant_type
from model_adapters.pipeline.prompts import read_batches
from quant_core.atomic_file import make_folder

T = TypeVar("T")


def identify(job: Job) -> Results:
    """Return where the results of a job that quantizes go, and what they depend on."""
    config, ranks, calibration = job.config, job.ranks, identify_calibration(job)
    quantization = quantization_fingerprint(calibration, config, job.model.disabled_layers, online=job.model.is_online)
    require_alike(ranks, quantization.fields, what="what the result depends on")
    folder = run_together(ranks, "making the staging folder", lambda: _folder(job))
    return Results(folder, calibration, quantization)


def identify_calibration(job: Job) -> Fingerprint:
    """Return what the float model's forwards, and so its images, depend on."""
    config, ranks = job.config, job.ranks
    model = shared_model_fields(config, ranks)
    batches = read_batches(config.pipeline, are_needed=job.model.needs_prompts)
    return calibration_fingerprint(config, job.model.adapter, ranks.mesh, model, batches)


def shared_model_fields(config: JobConfig, ranks: Ranks) -> Mapping[str, Any]:
    """Describe the model as every host sees it; raises ConfigurationError on all ranks when one sees another."""
    launch, stage = ranks.mesh.launch, "reading the model's files"
    if config.output.fingerprint == "stat":  # sizes and times differ between copies of one model
        return ask_first(ranks, stage, lambda: model_fields(config))
    share = run_together(ranks, stage, lambda: model_fields(config, launch.local_rank, launch.local_world))
    first_here = launch.rank - launch.local_rank
    shares = gather_objects(ranks, share, what=stage)[first_here : first_here + launch.local_world]
    fields = {name: value for each in shares for name, value in each.items()}
    return require_alike(ranks, fields, what="the files of the model")


def is_published(job: Job, results: Results) -> bool:
    """Tell whether this very job has been published already; raises InputError when another one has.

    Rank 0 looks for all: ranks that saw it differently would wait for each other.
    """
    return ask_first(job.ranks, "looking at the output folder", lambda: _is_published(job, results))


def ask_first(ranks: Ranks, stage: str, look: Callable[[], T]) -> T:
    """Return on all ranks what rank 0 finds; raises its error on all of them."""
    found = run_together(ranks, stage, lambda: look() if ranks.rank == 0 else None)
    [first, *_] = gather_objects(ranks, found, what=stage)
    assert first is not None, "rank 0 looked"
    return first


def run_folder(job: Job) -> RunFolder:
    """Return the names of the files that this rank of the job reads and writes."""
    weights, dumps = job.config.output.quant_weight_save_folder, job.config.output.quant_dump_calib_folder
    assert weights is not None, "the configuration requires it"
    assert dumps is not None, "the configuration requires it"
    return RunFolder(weights, dumps, quant_type(job), job.ranks.mesh, job.ranks.is_distributed)


def _folder(job: Job) -> RunFolder:
    folder = run_folder(job)
    make_folder(folder.staging)
    return folder


def _is_published(job: Job, results: Results) -> bool:
    folder, output = results.folder, job.config.output
    manifest = read_manifest(folder.manifest)
    if manifest is None:
        return False
    differences = results.quantization.differences(manifest.fields)
    if not differences and manifest.fingerprint != results.quantization.digest:
        differences = ["another version of this program made it, which meant something else by the same options"]
    if differences and not output.overwrite:
        raise another_jobs(folder.manifest, differences)
    if differences or output.resume == "never":
        return False
    changed = manifest.changed_files(folder.weights)
    again = f"published, but made again, as it was changed since: {', '.join(changed)}"
    job.console.say(again if changed else f"published already: {folder.manifest}")
    return not changed
