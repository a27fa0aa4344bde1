"""FLUX as the launcher sees it."""

from __future__ import annotations

from typing import Any

import numpy as np

from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.flux.inputs import check_options, transformer_inputs
from model_adapters.flux.options import FluxOptions
from model_adapters.flux.recipes import DISABLED_LAYERS
from model_adapters.flux.shard_plan import SHARD_PLANS
from model_adapters.flux.structure import STRUCTURE
from model_adapters.pipeline.generation import PNG, generate
from model_adapters.pipeline.noise_levels import shift
from model_adapters.pipeline.step_cache import step_cache
from model_adapters.pipeline.step_index import step_index

# Tokens of T5 that FLUX.1-dev was trained with; a shorter limit would move the ranges of the text stream.
_MAX_SEQUENCE_LENGTH = 512


def encode(pipeline: Any, prompts: list[str], options: FluxOptions) -> Embeddings:
    """Encode a batch of prompts: T5's tokens and CLIP's pooled vector."""
    embeds, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, max_sequence_length=_MAX_SEQUENCE_LENGTH, device=pipeline.text_encoder.device
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def set_timesteps(scheduler: Any, options: FluxOptions, steps: int) -> None:
    """Give a scheduler the pipeline's steps: evenly spaced sigmas, unless it spaces those of a flow by itself."""
    tokens = (options.width // 16) * (options.height // 16)
    spaces = scheduler.config.get("use_flow_sigmas")
    given = {"num_inference_steps": steps} if spaces else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    scheduler.set_timesteps(**given, mu=shift(scheduler, tokens, max_shift=1.15))


ADAPTER = ModelAdapter(
    name="flux",
    options=FluxOptions,
    transformer_class="FluxTransformer2DModel",
    pipeline_class="FluxPipeline",
    default_dtype="bfloat16",
    shard_plans=SHARD_PLANS,
    structure=STRUCTURE,
    disabled_layers=DISABLED_LAYERS,
    encode=encode,
    generate=generate,
    approximate=step_cache,
    step_index=step_index,
    set_timesteps=set_timesteps,
    check_options=check_options,
    result=PNG,
    transformer_inputs=transformer_inputs,
)
