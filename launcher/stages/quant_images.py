"""Make the images of the quantized model, from exactly what was published, in the arithmetic of the hardware."""

from __future__ import annotations

from launcher.failure.phases import run_together
from launcher.stages.calibrate import float_folder
from launcher.stages.encode import encode
from launcher.stages.images import have_images, list_images, run_pipeline
from launcher.stages.job import QuantJob
from quant_core.calibration.timestep import TimestepManager
from quant_core.checkpoint.loading import load_deployed

QUANT_IMAGES = "calib_quant"


def make_quant_images(job: QuantJob) -> None:
    """Make `calib_quant/`, which has the float images' prompts and noise, and list the images of both."""
    folder = job.config.output.save_path / QUANT_IMAGES
    if not have_images(job, folder):
        job.model.drop()
        encode(job)
        run_together(job.ranks, "loading the published checkpoint", lambda: _load(job))
        run_pipeline(job, "quantized images", folder=folder, may_approximate=True)
    list_images(job, [float_folder(job), folder])


def _load(job: QuantJob) -> None:
    """Read the float model anew and let its quantized layers compute from this rank's published shard."""
    model = job.model.transformer.model
    load_deployed(model, job.folder.shard())
    model.register_forward_pre_hook(lambda *_: _set_step(job.model.adapter.step_index(job.model.pipeline)))


def _set_step(index: int) -> None:
    """Do what the runtime's denoising loop does at the start of each step."""
    TimestepManager.set_timestep_idx(index)
