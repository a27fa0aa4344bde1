"""CALIBRATE: run the float pipeline on this rank's prompts and keep what quantizing needs of it.

That is a dump of what the transformer was called with, to be replayed, or with `--calibrate online` the ranges, taken
in the very same forwards, or both. What is used again is decided by the ranks of one copy together: one rank that
skipped the pipeline alone would leave the others in the model's collectives for ever. The copies decide apart, but go
through the same meetings: a copy whose files are finished runs no batch while another one goes on after its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from launcher.failure.phases import run_together
from launcher.files.calibration_parts import discard_strangers
from launcher.ranks.agreement import gather_objects
from launcher.stages.captured import Captured, CapturedCalls, CapturedRanges, Left
from launcher.stages.encode import encode
from launcher.stages.images import Gallery, lacking, run_pipeline
from launcher.stages.job import Job, Results
from launcher.stages.online import writes_dump
from launcher.stages.same_numbers import SameNumbers

FLOAT_IMAGES = "calib_fp"


class Calibration(NamedTuple):
    """This rank's files: calls of the transformer to replay, and ranges that need no replay; None: not made."""

    dump: Path | None = None
    ranges: Path | None = None


def calibrate(job: Job, results: Results) -> Calibration:
    """Return this rank's calibration: finished files of the same job, or new ones.

    Nothing if quantizing would not read it and the job says to dump only what is needed. Where the pipeline runs, the
    images of its batches are kept if they are wanted.
    """
    job.watch.enter("calibrate")
    calls, ranges = CapturedCalls(job, results), CapturedRanges(job, results)
    dumps = writes_dump(job.config, reads_activations=job.model.reads_activations)
    wanted: list[Captured] = [*([calls] if dumps else []), *([ranges] if job.model.is_online else [])]
    if job.model.reason_to_replay:
        job.console.say(
            f"calibrate: --calibrate online replays the calibration data here: {job.model.reason_to_replay}"
        )
    if wanted:
        _make(job, results, wanted)
    else:
        quant_type = job.config.quantization.quant_type
        otherwise = "--no_dump" if job.config.output.no_dump else "--calibrate always dumps them anyway"
        job.console.say(f"calibrate: skipped, {quant_type} reads no activations ({otherwise})")
    if not job.config.output.do_save_img:
        job.model.embeddings = {}  # an evaluation encodes prompts of its own
    return Calibration(calls.path if calls in wanted else None, ranges.path if ranges in wanted else None)


def _make(job: Job, results: Results, wanted: Sequence[Captured]) -> None:
    """Find this rank's files, or make them if any copy lacks one."""
    look = "looking at the calibration data"
    mine = run_together(job.ranks, look, lambda: [captured.left() for captured in wanted])
    everyone = gather_objects(job.ranks, mine, what="whether to calibrate")
    if all(left.is_there for each in everyone for left in each):
        for captured in wanted:
            job.console.say(f"calibrate: reusing {captured.path}")
        return
    job.watch.enter("load")
    encode(job)
    run_together(job.ranks, "loading the model", lambda: job.model.pipeline)
    job.watch.enter("calibrate")
    copy = [everyone[rank] for rank in job.ranks.mesh.tp_ranks]
    is_whole = [_is_whole([each[index] for each in copy], len(job.batches)) for index in range(len(wanted))]
    open_ends = [left.counts for each in copy for left, whole in zip(each, is_whole) if not whole]
    finished = max(frozenset.intersection(*open_ends)) if open_ends else len(job.batches)
    _run(job, results, [captured for captured, whole in zip(wanted, is_whole) if not whole], finished)
    keeps = [left.is_there and whole for left, whole in zip(mine, is_whole)]
    publish = [None if kept else captured.publish for captured, kept in zip(wanted, keeps)]
    said = run_together(job.ranks, "saving the calibration data", lambda: [make and make() for make in publish])
    if job.ranks.rank == 0:
        discard_strangers(results.folder.dumps, results.folder.calibrations())
    for captured, words in zip(wanted, said):
        job.console.say(f"calibrate: {f'{words} in' if words else 'reusing'} {captured.path}")


def _is_whole(copy: Sequence[Left], batches: int) -> bool:
    """Tell whether every rank of this copy has the file, or all its parts: they run the pipeline together."""
    return all(left.is_there or batches in left.counts for left in copy)


def _run(job: Job, results: Results, wanted: Sequence[Captured], finished: int) -> None:
    """Run the batches that no earlier run finished, and keep what is wanted of each."""
    if finished:
        job.console.say(f"calibrate: {finished} of {len(job.batches)} batches were finished by an earlier run")
    transformer = job.model.transformer.model
    same = SameNumbers(job.ranks, transformer, lambda: job.model.adapter.step_index(job.model.pipeline))
    with ExitStack() as stack:
        stack.enter_context(closing(same))
        keepers = [stack.enter_context(captured.capturing(finished)) for captured in wanted]

        def keep(done: int) -> None:
            number = finished + done
            same.check(f"batch {number} of {len(job.batches)}")
            for keeper in keepers:
                keeper(number - 1)

        run_pipeline(
            job,
            "calibrate",
            batches=job.batches[finished:],
            gallery=float_images(job, results) if job.config.output.do_save_img else None,
            after_batch=keep,
        )


def complete_float_images(job: Job, results: Results) -> None:
    """Make those of the float model's images that are not there or show another job."""
    gallery = float_images(job, results)
    if (batches := lacking(job, gallery)) is not None:
        job.watch.enter("images")
        run_pipeline(job, "float images", batches=batches, gallery=gallery)


def float_images(job: Job, results: Results) -> Gallery:
    """Return where the float model's images go and what they depend on."""
    return Gallery(job.config.output.save_path / FLOAT_IMAGES, results.calibration.digest)
