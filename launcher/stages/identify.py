"""IDENTIFY: find out what the job's results depend on, where they go, and whether they are there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from launcher.failure.phases import run_together
from launcher.files.identity import calibration_fingerprint, model_fields, quantization_fingerprint
from launcher.files.manifest import read_manifest
from launcher.files.run_folder import RunFolder
from launcher.ranks.agreement import gather_objects
from launcher.ranks.process_group import Ranks
from launcher.stages.job import Job, Results
from launcher.stages.quantize import quant_type
from model_adapters.pipeline.prompts import read_batches
from quant_core.atomic_file import make_folder, sweep
from quant_core.errors import InputError

T = TypeVar("T")


def identify(job: Job) -> Results:
    """Return where the job's results go and what they depend on; each rank reads a share of the model's files."""
    config, ranks = job.config, job.ranks
    stage = "reading the model's files"
    share = run_together(ranks, stage, lambda: model_fields(config, ranks.rank, ranks.world))
    shares = gather_objects(ranks, share, what=stage)
    model = {name: value for each in shares for name, value in each.items()}
    calibration = calibration_fingerprint(config, job.model.adapter, ranks.mesh, model, read_batches(config.pipeline))
    return Results(
        folder=run_together(ranks, "making the output folders", lambda: _folder(job)),
        calibration=calibration,
        quantization=quantization_fingerprint(calibration, config, job.model.disabled_layers),
    )


def is_published(job: Job, results: Results) -> bool:
    """Tell whether this very job has been published already; raises InputError when another one has.

    Rank 0 looks for all: ranks that saw it differently would wait for each other.
    """
    return _ask_first(job.ranks, "looking at the output folder", lambda: _is_published(job, results))


def _ask_first(ranks: Ranks, stage: str, look: Callable[[], T]) -> T:
    """Return on all ranks what rank 0 finds; raises its error on all of them."""
    found = run_together(ranks, stage, lambda: look() if ranks.rank == 0 else None)
    [first, *_] = gather_objects(ranks, found, what=stage)
    assert first is not None, "rank 0 looked"
    return first


def _folder(job: Job) -> RunFolder:
    weights, dumps = job.config.output.quant_weight_save_folder, job.config.output.quant_dump_calib_folder
    assert weights is not None, "the configuration requires it"
    assert dumps is not None, "the configuration requires it"
    folder = RunFolder(weights, dumps, quant_type(job), job.ranks.mesh, job.ranks.is_distributed)
    for path in (weights, dumps, folder.staging):
        make_folder(path)
        if job.ranks.rank == 0:
            sweep(path)
    return folder


def _is_published(job: Job, results: Results) -> bool:
    folder, output = results.folder, job.config.output
    manifest = read_manifest(folder.manifest)
    if manifest is None or output.resume == "never" or output.overwrite:
        return False
    differences = results.quantization.differences(manifest.fields)
    if not differences:
        changed = manifest.changed_files(folder.weights)
        if changed:
            job.console.say(f"published, but made again, as it was changed since: {', '.join(changed)}")
        return not changed
    raise InputError(
        "the output folder holds the checkpoint of another job",
        where=str(folder.manifest),
        why="; ".join(differences[:5]),
        advice="use another --quant_weight_save_folder, or --overwrite to replace it",
    )
