"""Run the pipeline on this rank's batches, and keep the images if they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from launcher.job import Job
from launcher.together import gather_objects
from model_adapters.prompts import Batch
from quant_core.atomic_file import make_folder, write_atomically, write_text_atomically
from quant_core.errors import ConfigurationError

Info = dict[str, Any]


def run_pipeline(
    job: Job,
    stage: str,
    *,
    folder: Path | None = None,
    after_batch: Callable[[Batch], object] = lambda batch: None,
) -> list[Info]:
    """Make this rank's images; returns what became of each, with its file if `folder` says where they go.

    All ranks of a tensor-parallel group compute the same images, and the first of them saves. Without a folder the
    decoder does not run.
    """
    saves = folder is not None and job.ranks.mesh.tp_rank == 0
    made: list[Info] = []
    for done, batch in enumerate(job.batches, start=1):
        images = job.model.adapter.generate(
            job.model.pipeline,
            [request.prompt for request in batch],
            job.config.pipeline,
            [torch.Generator("cpu").manual_seed(job.config.pipeline.seed + request.number) for request in batch],
            output_type="pil" if saves else "latent",
        )
        if saves and folder is not None:
            made += _save(images, batch, folder)
        after_batch(batch)
        job.console.progress(stage, done, len(job.batches))
    return made


def make_float_images(job: Job) -> None:
    """Make the images of the float model without quantizing, and list them in the info file."""
    made = run_pipeline(job, "images", folder=job.config.output.save_path)
    list_images(job, made)


def list_images(job: Job, made: Sequence[Info]) -> None:
    """Write which image came from which prompt, over all ranks, to the info file."""
    everything = [info for part in gather_objects(job.ranks, list(made), what="listing images") for info in part]
    if job.ranks.rank == 0:
        import json

        path = Path(job.config.pipeline.info_file_save_path)
        write_text_atomically(path, json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
        job.console.say(f"images: {len(everything)} listed in {path}")


def _save(images: Sequence[Any], batch: Batch, folder: Path) -> list[Info]:
    make_folder(folder)
    made = []
    for image, request in zip(images, batch):
        path = folder / f"{request.file_stem}.png"
        write_atomically(path, lambda temporary, image=image: image.save(temporary, format="PNG"))
        made.append({"images": [str(path)], "prompt": request.prompt, "category": request.category})
    return made


def check_save_path(job: Job) -> None:
    """Refuse a place for images that is a file."""
    path = job.config.output.save_path
    if job.config.output.do_save_img and path.exists() and not path.is_dir():
        raise ConfigurationError(
            f"'{path}' is a file", where="--save_path", why="images need a folder", advice="give another folder"
        )
