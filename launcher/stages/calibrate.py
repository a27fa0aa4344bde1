"""CALIBRATE: run the float pipeline on this rank's prompts and dump what the transformer was called with.

What is used again is decided by the ranks of one copy together: one rank that skipped the pipeline alone would leave
the others in the model's collectives for ever. The copies decide apart, but go through the same meetings: a copy
whose dumps are finished runs no batch while another one goes on after its last.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from launcher.failure.phases import run_together
from launcher.files.calibration_parts import CalibrationParts, load_sound_dump
from launcher.ranks.agreement import gather_objects
from launcher.stages.encode import encode
from launcher.stages.images import Gallery, lacking, run_pipeline
from launcher.stages.job import Job, Results
from launcher.stages.same_numbers import SameNumbers
from quant_core.calibration.capture import DumperManager
from quant_core.calibration.records import load_dump
from quant_core.errors import InputError

FLOAT_IMAGES = "calib_fp"


class _Left(NamedTuple):
    """What an earlier run left on a rank: its whole dump, or the first batches of it."""

    has_dump: bool
    batches: int


def calibrate(job: Job, results: Results) -> Path | None:
    """Return this rank's dump: a finished one of the same job, or a new one.

    None if quantizing would not read it and the job says to dump only what is needed. Images of the float model are
    made where they are wanted and not there.
    """
    job.watch.enter("calibrate")
    path = None if _is_needless(job) else _dump(job, results)
    if job.config.output.do_save_img:
        gallery = float_images(job, results)
        if (batches := lacking(job, gallery)) is not None:
            run_pipeline(job, "float images", batches=batches, gallery=gallery)
    return path


def _is_needless(job: Job) -> bool:
    wanted = job.config.output.calibrate == "always" or job.config.evaluation.evaluate == 0  # which measures on it
    if wanted or job.model.reads_activations:
        return False
    quant_type = job.config.quantization.quant_type
    job.console.say(f"calibrate: skipped, {quant_type} reads no activations (--calibrate always dumps them anyway)")
    return True


def _dump(job: Job, results: Results) -> Path:
    """Find this rank's dump, or make it if any copy lacks one of its."""
    path = results.folder.dump()
    parts = CalibrationParts.beside(path, results.calibration.digest)
    mine = run_together(job.ranks, "looking at the calibration data", lambda: _left(job, results, path, parts))
    everyone = gather_objects(job.ranks, mine, what="whether to calibrate")
    if all(left.has_dump for left in everyone):
        job.console.say(f"calibrate: reusing {path}")
        return path
    job.watch.enter("load")
    encode(job)
    run_together(job.ranks, "loading the model", lambda: job.model.pipeline)
    job.watch.enter("calibrate")
    finished = _finished(job, everyone)
    _run(job, results, parts, finished)
    keeps = mine.has_dump and finished == len(job.batches)
    records = run_together(
        job.ranks,
        "saving the calibration data",
        lambda: None if keeps else parts.assemble(path, len(job.batches), _header(job, results)),
    )
    job.console.say(f"calibrate: reusing {path}" if records is None else f"calibrate: {records} records in {path}")
    return path


def _left(job: Job, results: Results, path: Path, parts: CalibrationParts) -> _Left:
    if job.config.output.resume == "never":
        parts.discard()
        return _Left(has_dump=False, batches=0)
    return _Left(_is_reusable(job, results, path), parts.finished())


def _finished(job: Job, everyone: list[_Left]) -> int:
    """Return how many batches every rank of this copy has: they run the pipeline together, so they skip together."""
    total = len(job.batches)
    copy = [everyone[rank] for rank in job.ranks.mesh.tp_ranks]
    if all(left.has_dump or left.batches == total for left in copy):
        return total
    return min(left.batches for left in copy)


def _run(job: Job, results: Results, parts: CalibrationParts, finished: int) -> None:
    """Run the batches that no earlier run finished, and keep each one's records."""
    if finished:
        job.console.say(f"calibrate: {finished} of {len(job.batches)} batches were finished by an earlier run")
    transformer = job.model.transformer.model
    dumper = DumperManager(transformer, capture_mode="timestep", step_source=lambda: _current_step(job))
    same = SameNumbers(job.ranks, transformer, lambda: job.model.adapter.step_index(job.model.pipeline))

    def keep(done: int) -> None:
        number = finished + done
        same.check(f"batch {number} of {len(job.batches)}")
        parts.save(number - 1, dumper.take())

    run_pipeline(
        job,
        "calibrate",
        batches=job.batches[finished:],
        gallery=float_images(job, results) if job.config.output.do_save_img else None,
        after_batch=keep,
    )
    dumper.close()
    same.close()


def _current_step(job: Job) -> int:
    """Return the denoising step that the transformer is called for, and show it."""
    step = job.model.adapter.step_index(job.model.pipeline)
    job.watch.step("calibrate", step, job.config.pipeline.infer_steps)
    return step


def _header(job: Job, results: Results) -> dict[str, object]:
    mesh = job.ranks.mesh
    return {
        "fingerprint": results.calibration.digest,
        "fields": dict(results.calibration.fields),
        "rank": mesh.rank,
        "tp_rank": mesh.tp_rank,
        "dp_rank": mesh.dp_rank,
        "images": [request.number for batch in job.batches for request in batch],
    }


def _is_reusable(job: Job, results: Results, path: Path) -> bool:
    """Tell whether the dump at `path` is this job's; raises InputError when it is another job's, or damaged."""
    if not path.exists():
        return False
    header = load_dump(path)["header"]
    differences = results.calibration.differences(header.get("fields", {}))
    if not differences and header.get("rank") == job.ranks.rank:
        load_sound_dump(path)
        return True
    if job.config.output.overwrite:
        return False
    raise InputError(
        "the calibration data was made by another job",
        where=str(path),
        why="; ".join(differences[:5]) or f"rank: {header.get('rank')} -> {job.ranks.rank}",
        advice="use another --quant_dump_calib_folder, or --overwrite to replace it",
    )


def float_images(job: Job, results: Results) -> Gallery:
    """Return where the float model's images go and what they depend on."""
    return Gallery(job.config.output.save_path / FLOAT_IMAGES, results.calibration.digest)
