"""Run a pipeline on encoded prompts, with the arguments that the pipelines of diffusers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model_adapters.options import PipelineOptions


def generate(
    pipeline: Any,
    embeddings: Mapping[str, Tensor],
    options: PipelineOptions,
    generator: Any,
    output_type: str = "pil",
) -> Any:
    """Run the pipeline once for a batch of encoded prompts; guidance that nobody chose is the pipeline's own."""
    guidance = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    return pipeline(
        **embeddings,
        width=options.width,
        height=options.height,
        num_inference_steps=options.infer_steps,
        generator=generator,
        output_type=output_type,
        **guidance,
    ).images
