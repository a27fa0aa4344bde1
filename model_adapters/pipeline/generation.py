"""Run a pipeline of images on encoded prompts, with the arguments that those of diffusers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model_adapters.adapter import ResultFormat
from model_adapters.options import ImageOptions
from model_adapters.pipeline.noise import drawing_from

PNG = ResultFormat(".png", lambda image, path: image.save(path, format="PNG"))


def generate(
    pipeline: Any,
    embeddings: Mapping[str, Tensor],
    options: ImageOptions,
    generators: Any,
    *,
    decodes: bool = True,
) -> Any:
    """Run the pipeline once for a batch of encoded prompts; guidance that nobody chose is the pipeline's own."""
    guidance = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    with drawing_from(generators, pipeline.scheduler):
        return pipeline(
            **embeddings,
            width=options.width,
            height=options.height,
            num_inference_steps=options.infer_steps,
            generator=generators,
            output_type="pil" if decodes else "latent",
            **guidance,
        ).images
