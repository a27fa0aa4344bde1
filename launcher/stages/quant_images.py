"""Make the images of the quantized model, from exactly what was published, in the arithmetic of the hardware."""

from __future__ import annotations

from launcher.failure.phases import run_together
from launcher.files.identity import image_fingerprint
from launcher.stages.calibrate import float_images
from launcher.stages.encode import encode
from launcher.stages.images import Gallery, lacking, list_images, run_pipeline
from launcher.stages.job import Job, Results
from quant_core.calibration.timestep import TimestepManager
from quant_core.checkpoint.loading import load_deployed

QUANT_IMAGES = "calib_quant"


def make_quant_images(job: Job, results: Results) -> None:
    """Make `calib_quant/`, which has the float images' prompts and noise, and list the images of both."""
    gallery = quant_images(job, results)
    if (batches := lacking(job, gallery)) is not None:
        job.model.drop()
        encode(job)
        run_together(job.ranks, "loading the published checkpoint", lambda: _load(job, results))
        run_pipeline(job, "quantized images", batches=batches, gallery=gallery, may_approximate=True)
    list_images(job, [float_images(job, results), gallery])


def quant_images(job: Job, results: Results) -> Gallery:
    """Return where the quantized model's images go and what they depend on."""
    fingerprint = image_fingerprint(results.quantization, job.config)
    return Gallery(job.config.output.save_path / QUANT_IMAGES, fingerprint.digest)


def _load(job: Job, results: Results) -> None:
    """Read the float model anew and let its quantized layers compute from this rank's published shard."""
    model = job.model.transformer.model
    load_deployed(model, results.folder.shard())
    model.register_forward_pre_hook(lambda *_: _set_step(job.model.adapter.step_index(job.model.pipeline)))


def _set_step(index: int) -> None:
    """Do what the runtime's denoising loop does at the start of each step."""
    TimestepManager.set_timestep_idx(index)
