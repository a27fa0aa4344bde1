"""CALIBRATE: run the float pipeline on this rank's prompts and dump what the transformer was called with.

Whether finished dumps are used again is decided by all ranks together: one rank that skipped the pipeline alone
would leave the others in the model's collectives for ever.
"""

from __future__ import annotations

from pathlib import Path

from launcher.failure.phases import run_together
from launcher.files.calibration_parts import CalibrationParts
from launcher.ranks.agreement import all_agree, gather_objects
from launcher.stages.encode import encode
from launcher.stages.images import are_there, have_images, run_pipeline
from launcher.stages.job import QuantJob
from quant_core.calibration.capture import DumperManager
from quant_core.calibration.records import load_dump
from quant_core.errors import InputError

FLOAT_IMAGES = "calib_fp"


def calibrate(job: QuantJob, *, is_read: bool) -> Path | None:
    """Return this rank's dump: a finished one of the same job, or a new one.

    None if nothing would read it (`is_read`) and the job says to dump only what is needed.
    """
    job.watch.enter("calibrate")
    if not is_read and job.config.output.calibrate == "needed":
        return _skip(job)
    path = job.folder.dump()
    mine = run_together(job.ranks, "looking at the calibration data", lambda: _is_reusable(job, path))
    if all_agree(job.ranks, mine, what="whether to calibrate"):
        job.console.say(f"calibrate: reusing {path}")
        if job.config.output.do_save_img and not have_images(job, float_folder(job)):
            run_pipeline(job, "float images", folder=float_folder(job))
        return path
    job.watch.enter("load")
    encode(job)
    run_together(job.ranks, "loading the model", lambda: job.model.pipeline)
    job.watch.enter("calibrate")
    _run(job, path)
    return path


def _run(job: QuantJob, path: Path) -> None:
    """Run the batches that no earlier run finished, and assemble the dump."""
    parts = CalibrationParts.beside(path, job.calibration.digest)
    skip = _finished_by_all(job, parts)
    if skip:
        job.console.say(f"calibrate: {skip} of {len(job.batches)} batches were finished by an earlier run")
    dumper = DumperManager(job.model.transformer.model, capture_mode="timestep", step_source=lambda: _current_step(job))
    run_pipeline(
        job,
        "calibrate",
        folder=float_folder(job) if job.config.output.do_save_img else None,
        skip=skip,
        after_batch=lambda batch: parts.save(batch, dumper.take()),
    )
    dumper.close()
    records = run_together(
        job.ranks,
        "saving the calibration data",
        lambda: parts.assemble(path, len(job.batches), _header(job)),
    )
    job.console.say(f"calibrate: {records} records in {path}")


def _current_step(job: QuantJob) -> int:
    """Return the denoising step that the transformer is called for, and show it."""
    step = job.model.adapter.step_index(job.model.pipeline)
    job.watch.step("calibrate", step, job.config.pipeline.infer_steps)
    return step


def _finished_by_all(job: QuantJob, parts: CalibrationParts) -> int:
    """Return how many batches every rank of this copy has: they run the pipeline together, so they skip together."""
    if job.config.output.resume == "never":
        parts.discard()
    mine = parts.finished()
    while mine and job.config.output.do_save_img and not are_there(float_folder(job), job.batches[:mine]):
        mine -= 1
    counts = gather_objects(job.ranks, mine, what="looking at the finished batches")
    return min(counts[rank] for rank in job.ranks.mesh.tp_ranks)


def _skip(job: QuantJob) -> None:
    """Dump nothing; images that are wanted are made all the same."""
    quant_type = job.config.quantization.quant_type
    job.console.say(f"calibrate: skipped, {quant_type} reads no activations (--calibrate always dumps them anyway)")
    if job.config.output.do_save_img and not have_images(job, float_folder(job)):
        run_pipeline(job, "float images", folder=float_folder(job))


def _header(job: QuantJob) -> dict[str, object]:
    mesh = job.ranks.mesh
    return {
        "fingerprint": job.calibration.digest,
        "fields": dict(job.calibration.fields),
        "rank": mesh.rank,
        "tp_rank": mesh.tp_rank,
        "dp_rank": mesh.dp_rank,
        "images": [request.number for batch in job.batches for request in batch],
    }


def _is_reusable(job: QuantJob, path: Path) -> bool:
    """Tell whether the dump at `path` is this job's; raises InputError when it is another job's."""
    if not path.exists() or job.config.output.resume == "never":
        return False
    header = load_dump(path)["header"]
    differences = job.calibration.differences(header.get("fields", {}))
    if not differences and header.get("rank") == job.ranks.rank:
        return True
    if job.config.output.overwrite:
        return False
    raise InputError(
        "the calibration data was made by another job",
        where=str(path),
        why="; ".join(differences[:5]) or f"rank: {header.get('rank')} -> {job.ranks.rank}",
        advice="use another --quant_dump_calib_folder, or --overwrite to replace it",
    )


def float_folder(job: QuantJob) -> Path:
    """Return where the float model's images go."""
    return job.config.output.save_path / FLOAT_IMAGES
