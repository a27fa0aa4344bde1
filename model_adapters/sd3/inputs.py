"""What SD3's transformer is called with, as shapes: nothing is computed and nothing is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_adapters.inputs import TransformerInputs
from model_adapters.sd3.options import SD3Options
from quant_core.errors import ConfigurationError

_PIXELS_PER_LATENT = 8
# 77 tokens of CLIP in front of 256 of T5.
_TEXT_TOKENS = 333


def transformer_inputs(config: Any, options: SD3Options, dtype: torch.dtype) -> TransformerInputs:
    """Return the inputs of one forward on the meta device; config: the transformer's."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = options.batch_size * (2 if options.is_guided else 1)
    height, width = options.height // _PIXELS_PER_LATENT, options.width // _PIXELS_PER_LATENT
    return TransformerInputs(
        of_step={"hidden_states": empty(batch, config.in_channels, height, width), "timestep": empty(batch)},
        of_prompt={
            "encoder_hidden_states": empty(batch, _TEXT_TOKENS, config.joint_attention_dim),
            "pooled_projections": empty(batch, config.pooled_projection_dim),
        },
        of_run={},
    )


def check_options(config: Any, options: SD3Options) -> None:
    """Refuse an image that is larger than the transformer's table of positions."""
    largest = config.pos_embed_max_size * config.patch_size * _PIXELS_PER_LATENT
    if max(options.width, options.height) > largest:
        raise ConfigurationError(
            f"an image of {options.width} x {options.height} pixels is too large for this transformer",
            where="--width, --height, transformer/config.json",
            why=f"its table of positions (pos_embed_max_size {config.pos_embed_max_size}) ends at {largest} pixels",
            advice=f"ask for at most {largest} pixels a side",
        )
