"""SD3 and SD3.5 as the launcher sees them."""

from __future__ import annotations

from typing import Any

from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.pipeline.generation import PNG, generate
from model_adapters.pipeline.noise_levels import shift
from model_adapters.pipeline.step_index import step_index
from model_adapters.sd3.inputs import check_options, transformer_inputs
from model_adapters.sd3.options import SD3Options
from model_adapters.sd3.recipes import DISABLED_LAYERS
from model_adapters.sd3.shard_plan import SHARD_PLANS
from model_adapters.sd3.structure import STRUCTURE


def encode(pipeline: Any, prompts: list[str], options: SD3Options) -> Embeddings:
    """Encode a batch of prompts, and where guidance leads away from it the empty prompt."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        negative_prompt=[""] * len(prompts),
        do_classifier_free_guidance=options.is_guided,
        device=pipeline.text_encoder.device,
    )
    return {name: tensor for name, tensor in zip(names, encoded) if tensor is not None}


def set_timesteps(scheduler: Any, options: SD3Options, steps: int) -> None:
    """Give a scheduler the pipeline's steps: its own, shifted by the image's tokens where its settings say so."""
    tokens = (options.width // 16) * (options.height // 16)
    is_shifted = scheduler.config.get("use_dynamic_shifting")
    scheduler.set_timesteps(steps, **({"mu": shift(scheduler, tokens, max_shift=1.16)} if is_shifted else {}))


ADAPTER = ModelAdapter(
    name="sd3",
    options=SD3Options,
    transformer_class="SD3Transformer2DModel",
    pipeline_class="StableDiffusion3Pipeline",
    default_dtype="float16",
    shard_plans=SHARD_PLANS,
    structure=STRUCTURE,
    disabled_layers=DISABLED_LAYERS,
    encode=encode,
    generate=generate,
    step_index=step_index,
    set_timesteps=set_timesteps,
    check_options=check_options,
    result=PNG,
    transformer_inputs=transformer_inputs,
)
