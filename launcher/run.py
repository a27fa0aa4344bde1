"""One job from the configuration to the published checkpoint: the table of contents of a run.

Every stage leaves complete files behind and skips itself when a matching earlier run already left them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from launcher.config.job_config import JobConfig
from launcher.failure.monitor import Monitor
from launcher.failure.phases import run_together
from launcher.files.identity import common_options
from launcher.journal.logs import log, quiet_diffusers
from launcher.ranks.agreement import barrier, require_alike_in_store
from launcher.ranks.process_group import Ranks, join, part
from launcher.stages.calibrate import calibrate, complete_float_images
from launcher.stages.evaluate import check_evaluation, evaluate
from launcher.stages.fetch import fetch
from launcher.stages.folders import own_folders
from launcher.stages.identify import identify, is_published, run_folder
from launcher.stages.images import explain_approximation, make_float_images
from launcher.stages.job import Job
from launcher.stages.merge import merge
from launcher.stages.model_session import ModelSession
from launcher.stages.places import check_save_path
from launcher.stages.quant_images import make_quant_images
from launcher.stages.quantize import quantize
from model_adapters.pipeline.prompts import Batch, read_batches, share_of_copy


def run(config: JobConfig, watch: Monitor | None = None) -> None:
    """Run the job on this rank, together with the others; a caller in Python may do without a started monitor."""
    _on_ranks(config, watch, _quantize if config.quantization.do_quant else make_float_images)


def evaluate_published(config: JobConfig, watch: Monitor | None = None) -> None:
    """Evaluate what the job has published, and do nothing else of it."""
    _on_ranks(config, watch, lambda job: evaluate(job, run_folder(job)), only_evaluates=True)


def _on_ranks(
    config: JobConfig, watch: Monitor | None, work: Callable[[Job], object], *, only_evaluates: bool = False
) -> None:
    watch = watch or Monitor(config)
    quiet_diffusers()
    require_alike_in_store(watch.rendezvous.groups, watch.launch, common_options(config), what="the options")
    ranks = join(config, watch.launch, watch.rendezvous.groups)
    for reason in ranks.reasons:
        watch.console.say(reason)
    asked, config = config, fetch(config, ranks, watch)
    watch.enter("prepare")
    log("asked for", words=sys.argv[1:])
    job = run_together(ranks, "preparing", lambda: _prepare(asked, config, ranks, watch, only_evaluates))
    gc.freeze()  # what was imported stays: looking through it takes a quarter of a second, whenever a model goes
    with own_folders(job, only_weights=only_evaluates):
        work(job)
    barrier(ranks, "the end")  # still watched, so a rank that stands still before it is named, and signals are heard
    watch.finish()
    part(ranks)


def _quantize(job: Job) -> None:
    results, wants_images = identify(job), job.config.output.do_save_img
    calibration = None if is_published(job, results) else calibrate(job, results)
    if wants_images:
        complete_float_images(job, results)  # before quantizing changes the model
    if calibration is not None:
        job.watch.safe_point(job.ranks.control)
        quantize(job, results, *calibration)
        job.watch.safe_point(job.ranks.control)
        merge(job, results)
    if wants_images:
        make_quant_images(job, results)
    evaluate(job, results.folder)


def _prepare(asked: JobConfig, config: JobConfig, ranks: Ranks, watch: Monitor, only_evaluates: bool) -> Job:
    """Check everything that can be checked before anything is loaded or written."""
    session = ModelSession(config, ranks, only_evaluates)
    session.check()
    batches = [] if only_evaluates else read_batches(config.pipeline, are_needed=session.needs_prompts)
    job = Job(asked, config, ranks, session, watch, _share(batches, ranks) if batches else [])
    check_save_path(config, lists=ranks.rank == 0)
    check_evaluation(config, session.adapter)
    explain_approximation(job)
    return job


def _share(batches: list[Batch], ranks: Ranks) -> list[Batch]:
    mesh = ranks.mesh
    return share_of_copy(batches, mesh.dp_size, mesh.dp_rank, where=f"{mesh.dp_size} data-parallel ranks")
