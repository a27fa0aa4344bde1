"""One job from the configuration to the published checkpoint: the table of contents of a run.

Every stage leaves complete files behind and skips itself when a matching earlier run already left them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from launcher.config.job_config import JobConfig
from launcher.failure.monitor import Monitor
from launcher.failure.phases import run_together
from launcher.files.identity import calibration_fingerprint, model_fields, quantization_fingerprint
from launcher.files.manifest import read_manifest
from launcher.files.run_folder import RunFolder
from launcher.journal.logs import quiet_diffusers
from launcher.ranks.agreement import gather_objects
from launcher.ranks.process_group import Ranks, join, leave
from launcher.stages.calibrate import calibrate
from launcher.stages.images import check_save_path, explain_cache, make_float_images
from launcher.stages.job import Job, QuantJob
from launcher.stages.merge import merge
from launcher.stages.model_session import ModelSession
from launcher.stages.quant_images import make_quant_images
from launcher.stages.quantize import quantize, reads_dump
from model_adapters.pipeline.prompts import Batch, even_share, read_batches
from quant_core.atomic_file import make_folder, sweep
from quant_core.errors import InputError

T = TypeVar("T")


def run(config: JobConfig, watch: Monitor | None = None) -> None:
    """Run the job on this rank, together with the others; a caller in Python may do without a started monitor."""
    watch = watch or Monitor(config)
    quiet_diffusers()
    ranks = join(config, watch.launch, watch.rendezvous.groups)
    for reason in ranks.reasons:
        watch.console.say(reason)
    watch.enter("prepare")
    job = run_together(ranks, "preparing", lambda: _prepare(config, ranks, watch))
    if config.quantization.do_quant:
        _quantize(_identify(job))
    else:
        make_float_images(job)
    watch.finish()
    leave(ranks)


def _quantize(job: QuantJob) -> None:
    if run_together(job.ranks, "looking at the output folder", lambda: _is_published(job)):
        job.console.say(f"published already: {job.folder.manifest}")
    else:
        dump = calibrate(job, is_read=reads_dump(job))
        job.watch.safe_point(job.ranks.control)
        quantize(job, dump)
        job.watch.safe_point(job.ranks.control)
        merge(job)
    if job.config.output.do_save_img:
        make_quant_images(job)


def _prepare(config: JobConfig, ranks: Ranks, watch: Monitor) -> Job:
    """Check everything that can be checked before anything is loaded or written."""
    session = ModelSession(config, ranks)
    session.check()
    job = Job(config, ranks, session, watch, _share(read_batches(config.pipeline), ranks))
    check_save_path(job)
    explain_cache(job)
    return job


def _share(batches: list[Batch], ranks: Ranks) -> list[Batch]:
    """Return this copy's batches: consecutive ones, so that the dumps of all copies, in order, are those of one."""
    mesh = ranks.mesh
    return even_share(batches, mesh.dp_size, mesh.dp_rank, where=f"{mesh.dp_size} data-parallel ranks")


def _identify(job: Job) -> QuantJob:
    """Find out what the job's results depend on, and where they go; rank 0 reads the weights for all."""
    config, ranks = job.config, job.ranks
    model = run_together(ranks, "reading the model's weights", lambda: _on_first(ranks, lambda: model_fields(config)))
    everything = read_batches(config.pipeline)
    fields = next(found for found in gather_objects(ranks, model, what="the fingerprint") if found is not None)
    calibration = calibration_fingerprint(job.model, ranks.mesh, fields, everything)
    return QuantJob(
        **{name: getattr(job, name) for name in Job.__dataclass_fields__},
        folder=run_together(ranks, "making the output folders", lambda: _folder(job)),
        calibration=calibration,
        quantization=quantization_fingerprint(calibration, job.model),
    )


def _on_first(ranks: Ranks, work: Callable[[], T]) -> T | None:
    return work() if ranks.rank == 0 else None


def _folder(job: Job) -> RunFolder:
    weights, dumps = job.config.output.quant_weight_save_folder, job.config.output.quant_dump_calib_folder
    assert weights is not None, "the configuration requires it"
    assert dumps is not None, "the configuration requires it"
    scheme = job.config.quantization.quant_type.removesuffix("_fa3")
    folder = RunFolder(weights, dumps, scheme, job.ranks.mesh, job.ranks.is_distributed)
    for path in (weights, dumps, folder.staging):
        make_folder(path)
        if job.ranks.rank == 0:
            sweep(path)
    return folder


def _is_published(job: QuantJob) -> bool:
    """Tell whether this very job has been published here; raises InputError when another one has."""
    manifest = read_manifest(job.folder.manifest)
    if manifest is None or job.config.output.resume == "never" or job.config.output.overwrite:
        return False
    differences = job.quantization.differences(manifest.fields)
    if not differences:
        return manifest.files_are_there(job.folder.weights)
    raise InputError(
        "the output folder holds the checkpoint of another job",
        where=str(job.folder.manifest),
        why="; ".join(differences[:5]),
        advice="use another --quant_weight_save_folder, or --overwrite to replace it",
    )
