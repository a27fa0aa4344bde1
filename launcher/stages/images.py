"""Run the pipeline on this rank's batches, and keep the images (or whatever the model makes) if they are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.files.identity import image_fingerprint
from launcher.files.image_record import record, shows
from launcher.ranks.agreement import gather_objects, require_alike
from launcher.stages.encode import encode, prompts_of
from launcher.stages.identify import identify_calibration
from launcher.stages.job import Job
from model_adapters.pipeline.prompts import Batch, ImageRequest
from quant_core.atomic_file import make_folder, write_atomically, write_text_atomically

Info = dict[str, Any]


@dataclass(frozen=True)
class Gallery:
    """A folder of images that show one job, known by the digest of its fingerprint."""

    folder: Path
    fingerprint: str


def run_pipeline(
    job: Job,
    stage: str,
    *,
    batches: Sequence[Batch] | None = None,
    gallery: Gallery | None = None,
    may_approximate: bool = False,
    after_batch: Callable[[int], object] = lambda done: None,
) -> None:
    """Make the images of some batches, all of this rank's by default, and keep them if there is a gallery.

    All ranks call it, each copy with batches of its own, or none; the ranks of one copy compute the same images, and
    the first of them saves. Without a gallery the decoder does not run. `after_batch` gets the number of finished
    batches; after it the ranks of one copy may stop together. Steps are approximated only if the options say so and
    they `may_approximate`.
    """
    todo = job.batches if batches is None else batches
    encode(job)
    lead = _lead(job, len(todo))
    with job.model.approximating() if may_approximate else nullcontext():
        _run_batches(job, stage, todo, gallery, after_batch)
    gather_objects(job.ranks, None, what=f"the end of {stage}", timeout_s=lead * job.ranks.timeout_s)


def _lead(job: Job, batches: int) -> int:
    """Return for how many batches one copy may have to wait for another, one at least.

    A wait between two ranks is at most as long as one batch, so a copy that has less to do waits for a multiple.
    """
    counts = gather_objects(job.ranks, batches, what="counting the batches")
    return max(counts) - min(counts) + 1


# By whether the job quantizes and whether it saves images; one that does neither is refused.
_APPROXIMATION_MEANS = {
    (False, True): "steps of the images are approximated from earlier ones",
    (True, False): "no effect, as calibration is never approximated and no image is saved",
    (True, True): "steps of the quantized images are approximated, those of calibration and its images never",
}


def explain_approximation(job: Job) -> None:
    """Say what the option to approximate steps does in this job, if it was given."""
    config = job.config
    if option := config.pipeline.approximation:
        meaning = _APPROXIMATION_MEANS[config.quantization.do_quant, config.output.do_save_img]
        job.console.say(f"{option}: {meaning}")


def _run_batches(
    job: Job, stage: str, batches: Sequence[Batch], gallery: Gallery | None, after_batch: Callable[[int], object]
) -> None:
    saves = gallery is not None and _saves(job)
    total, before = len(job.batches), len(job.batches) - len(batches)
    job.watch.progress(stage, before, total)
    for done, batch in enumerate(batches, start=1):
        images = job.model.adapter.generate(
            job.model.pipeline,
            job.model.embeddings_of(prompts_of(batch)),
            job.config.pipeline,
            [torch.Generator("cpu").manual_seed(job.config.pipeline.seed + request.number) for request in batch],
            decodes=saves,
        )
        if saves and gallery is not None:
            _save(job, images, batch, gallery)
        after_batch(done)
        job.watch.progress(stage, before + done, total)
        if done < len(batches):
            job.watch.safe_point(job.ranks.tp_control)


def make_float_images(job: Job) -> None:
    """Make the images of the float model without quantizing, those that no earlier run of the same job made."""
    calibration = identify_calibration(job)
    require_alike(job.ranks, calibration.fields, what="what the images depend on")
    gallery = Gallery(job.config.output.save_path, image_fingerprint(calibration, job.config).digest)
    job.watch.enter("images")
    if (batches := lacking(job, gallery)) is not None:
        run_pipeline(job, "images", batches=batches, gallery=gallery, may_approximate=True)
    list_images(job, [gallery])


def lacking(job: Job, gallery: Gallery) -> list[Batch] | None:
    """Return those of this copy's batches of which an image is not there or shows another job.

    None, on all ranks, when no copy lacks any: then nothing need be loaded.
    """
    seen = job.batches if _saves(job) else []
    mine = [index for index, batch in enumerate(seen) if not _is_shown(job, gallery, batch)]
    found = gather_objects(job.ranks, mine, what="looking at the images")
    if not any(found):
        return None
    return [job.batches[index] for index in found[job.ranks.mesh.tp_ranks[0]]]


def _is_shown(job: Job, gallery: Gallery, batch: Batch) -> bool:
    return all(shows(image_file(job, gallery.folder, request), gallery.fingerprint) for request in batch)


def list_images(job: Job, galleries: Sequence[Gallery]) -> None:
    """Write which images of the galleries came from which prompt, over all ranks, to the info file."""
    mine = [_info(job, request, galleries) for batch in job.batches for request in batch]
    shares = gather_objects(job.ranks, mine, what="listing images")
    if job.ranks.rank == 0:
        everything = [info for share in shares[:: job.ranks.mesh.tp_size] for info in share]
        path = Path(job.config.pipeline.info_file_save_path)
        write_text_atomically(path, json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
        job.console.say(f"images: {len(everything)} prompts listed in {path}")


def _info(job: Job, request: ImageRequest, galleries: Sequence[Gallery]) -> Info:
    files = {image_file(job, gallery.folder, request): gallery.fingerprint for gallery in galleries}
    return {
        "images": [str(file) for file, fingerprint in files.items() if shows(file, fingerprint)],
        "prompt": request.prompt,
        "category": request.category,
    }


def image_file(job: Job, folder: Path, request: ImageRequest) -> Path:
    """Return where an image goes."""
    return folder / f"{request.file_stem}{job.model.adapter.result.suffix}"


def _saves(job: Job) -> bool:
    return job.ranks.mesh.tp_rank == 0


def _save(job: Job, images: Sequence[Any], batch: Batch, gallery: Gallery) -> None:
    make_folder(gallery.folder)
    for image, request in zip(images, batch):
        path = image_file(job, gallery.folder, request)
        write_atomically(path, partial(job.model.adapter.result.save, image))
        record(path, gallery.fingerprint)
