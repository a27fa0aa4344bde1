"""FLUX as the launcher sees it."""

from __future__ import annotations

from typing import Any

from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.flux.inputs import transformer_inputs
from model_adapters.flux.options import DEVICE_TYPES, FluxOptions
from model_adapters.flux.recipes import DISABLED_LAYERS
from model_adapters.flux.shard_plan import SHARD_PLANS
from model_adapters.flux.structure import STRUCTURE

# Tokens of T5 that FLUX.1-dev was trained with; a shorter limit would move the ranges of the text stream.
_MAX_SEQUENCE_LENGTH = 512


def encode(pipeline: Any, prompts: list[str], options: FluxOptions) -> Embeddings:
    """Encode a batch of prompts: T5's tokens and CLIP's pooled vector."""
    embeds, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, max_sequence_length=_MAX_SEQUENCE_LENGTH, device=pipeline.text_encoder.device
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


ADAPTER = ModelAdapter(
    name="flux",
    options=FluxOptions,
    device_types=DEVICE_TYPES,
    transformer_class="FluxTransformer2DModel",
    pipeline_class="FluxPipeline",
    default_dtype="bfloat16",
    shard_plans=SHARD_PLANS,
    structure=STRUCTURE,
    disabled_layers=DISABLED_LAYERS,
    encode=encode,
    transformer_inputs=transformer_inputs,
)
