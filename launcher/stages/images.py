"""Run the pipeline on this rank's batches, and keep the images if they are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.ranks.agreement import all_agree, gather_objects
from launcher.stages.encode import encode, prompts_of
from launcher.stages.job import Job
from model_adapters.pipeline.prompts import Batch, ImageRequest
from model_adapters.pipeline.step_cache import step_cache
from quant_core.atomic_file import make_folder, write_atomically, write_text_atomically
from quant_core.errors import ConfigurationError

Info = dict[str, Any]


def run_pipeline(
    job: Job,
    stage: str,
    *,
    folder: Path | None = None,
    skip: int = 0,
    may_approximate: bool = False,
    after_batch: Callable[[int], object] = lambda batch: None,
) -> None:
    """Make this rank's images, and save them if `folder` says where.

    All ranks of a tensor-parallel group compute the same images, and the first of them saves. Without a folder the
    decoder does not run. The first `skip` batches were made by an earlier run. `after_batch` gets the batch's index;
    after it the ranks of one copy may stop together. With --use_cache steps are approximated where they may be.
    """
    encode(job)
    with step_cache(job.model.pipeline.transformer) if may_approximate and uses_cache(job) else nullcontext():
        _run_batches(job, stage, folder, skip, after_batch)


def uses_cache(job: Job) -> bool:
    """Tell whether images are to be made with approximated steps; models without the option never are."""
    return getattr(job.config.pipeline, "use_cache", False)


# By whether the job quantizes and whether it saves images; one that does neither is refused.
_CACHE_MEANS = {
    (False, True): "steps of the images are approximated from earlier ones",
    (True, False): "no effect, as calibration is never approximated and no image is saved",
    (True, True): "steps of the quantized images are approximated, those of calibration and its images never",
}


def explain_cache(job: Job) -> None:
    """Say what --use_cache does in this job, if it was given."""
    if uses_cache(job):
        config = job.config
        job.console.say(f"use_cache: {_CACHE_MEANS[config.quantization.do_quant, config.output.do_save_img]}")


def _run_batches(job: Job, stage: str, folder: Path | None, skip: int, after_batch: Callable[[int], object]) -> None:
    saves = folder is not None and job.ranks.mesh.tp_rank == 0
    job.watch.progress(stage, skip, len(job.batches))
    for done, batch in enumerate(job.batches[skip:], start=skip + 1):
        images = job.model.adapter.generate(
            job.model.pipeline,
            job.model.embeddings_of(prompts_of(batch)),
            job.config.pipeline,
            [torch.Generator("cpu").manual_seed(job.config.pipeline.seed + request.number) for request in batch],
            output_type="pil" if saves else "latent",
        )
        if saves and folder is not None:
            _save(images, batch, folder)
        after_batch(done - 1)
        job.watch.progress(stage, done, len(job.batches))
        if done < len(job.batches):
            job.watch.safe_point(job.ranks.tp_control)


def make_float_images(job: Job) -> None:
    """Make the images of the float model without quantizing."""
    job.watch.enter("images")
    folder = job.config.output.save_path
    run_pipeline(job, "images", folder=folder, may_approximate=True)
    list_images(job, [folder])


def have_images(job: Job, folder: Path) -> bool:
    """Tell, on all ranks alike, whether every image of this job is in the folder already."""
    return all_agree(job.ranks, are_there(folder, job.batches), what="whether to make images")


def are_there(folder: Path, batches: Sequence[Batch]) -> bool:
    """Tell whether the folder holds every image of some batches."""
    return all(image_file(folder, request).is_file() for batch in batches for request in batch)


def list_images(job: Job, folders: Sequence[Path]) -> None:
    """Write which images in the folders came from which prompt, over all ranks, to the info file."""
    mine = [_info(request, folders) for batch in job.batches for request in batch]
    shares = gather_objects(job.ranks, mine, what="listing images")
    if job.ranks.rank == 0:
        everything = [info for share in shares[:: job.ranks.mesh.tp_size] for info in share]
        path = Path(job.config.pipeline.info_file_save_path)
        write_text_atomically(path, json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
        job.console.say(f"images: {len(everything)} prompts listed in {path}")


def _info(request: ImageRequest, folders: Sequence[Path]) -> Info:
    files = [image_file(folder, request) for folder in folders]
    return {
        "images": [str(file) for file in files if file.is_file()],
        "prompt": request.prompt,
        "category": request.category,
    }


def image_file(folder: Path, request: ImageRequest) -> Path:
    """Return where an image goes."""
    return folder / f"{request.file_stem}.png"


def _save(images: Sequence[Any], batch: Batch, folder: Path) -> None:
    make_folder(folder)
    for image, request in zip(images, batch):
        write_atomically(image_file(folder, request), partial(image.save, format="PNG"))


def check_save_path(job: Job) -> None:
    """Refuse a place for images that is a file."""
    path = job.config.output.save_path
    if job.config.output.do_save_img and path.exists() and not path.is_dir():
        raise ConfigurationError(
            f"'{path}' is a file", where="--save_path", why="images need a folder", advice="give another folder"
        )
