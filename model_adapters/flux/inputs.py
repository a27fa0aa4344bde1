"""What FLUX's transformer is called with, as shapes: nothing is computed and nothing is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_adapters.flux.options import FluxOptions
from model_adapters.inputs import TransformerInputs
from quant_core.errors import ConfigurationError

# The VAE makes one latent of 8 x 8 pixels, and the transformer one token of 2 x 2 latents.
_PIXELS_PER_TOKEN = 16
_TEXT_TOKENS = 512


def transformer_inputs(config: Any, options: FluxOptions, dtype: torch.dtype) -> TransformerInputs:
    """Return the inputs of one forward on the meta device; config: the transformer's."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = options.batch_size
    tokens = (options.width // _PIXELS_PER_TOKEN) * (options.height // _PIXELS_PER_TOKEN)
    return TransformerInputs(
        of_step={"hidden_states": empty(batch, tokens, config.in_channels), "timestep": empty(batch)},
        of_prompt={
            "encoder_hidden_states": empty(batch, _TEXT_TOKENS, config.joint_attention_dim),
            "pooled_projections": empty(batch, config.pooled_projection_dim),
        },
        of_run={
            **({"guidance": empty(batch, dtype=torch.float32)} if config.guidance_embeds else {}),
            "txt_ids": empty(_TEXT_TOKENS, 3),
            "img_ids": empty(tokens, 3),
        },
    )


def check_options(config: Any, options: FluxOptions) -> None:
    """Refuse a guidance scale for a transformer that reads none (FLUX.1-schnell)."""
    if options.guidance_scale is not None and not config.guidance_embeds:
        raise ConfigurationError(
            f"--guidance_scale {options.guidance_scale} has no meaning for this transformer",
            where="--guidance_scale, transformer/config.json",
            why="it reads no guidance: guidance_embeds is false",
            advice="drop --guidance_scale",
        )
