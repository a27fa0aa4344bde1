"""The tiny FLUX: two blocks of two streams, two of one, and guidance as an input that is always 3.5."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
import torch
import transformers
from torch import Tensor, nn

from scripts.tiny_training.recipe import DIFFUSERS_PARTS, LATENT_SIDE, PATCHES, Recipe, start_as_identity
from scripts.tiny_training.steps import Budget
from scripts.tiny_training.text import SHORT_LENGTH, T5_WIDTH, build_t5, clip_config, pad_bias
from scripts.tiny_training.vae import LATENT_CHANNELS

CLIP_WIDTH = 64
TEXT_LENGTH = 512  # tokens; FluxPipeline's max_sequence_length
GUIDANCE = 3.5


def _build() -> nn.ModuleDict:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,  # patches of 2 x 2 latents
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),  # sums to the head dim; each even, because rotations act on pairs
    )
    return nn.ModuleDict(
        {
            "text_encoder": transformers.CLIPTextModel(clip_config(CLIP_WIDTH, layers=2)),
            "text_encoder_2": build_t5(),
            "transformer": start_as_identity(transformer),
        }
    )


def _velocity(models: nn.ModuleDict, ids: Mapping[str, Tensor], noisy: Tensor, noise_share: Tensor) -> Tensor:
    pictures = len(noisy)
    pipeline = diffusers.FluxPipeline
    image_ids = pipeline._prepare_latent_image_ids(
        pictures, LATENT_SIDE // 2, LATENT_SIDE // 2, noisy.device, noisy.dtype
    )
    tokens = models["transformer"](
        hidden_states=pipeline._pack_latents(noisy, pictures, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE),
        encoder_hidden_states=models["text_encoder_2"](ids["tokenizer_2"])[0],
        pooled_projections=models["text_encoder"](ids["tokenizer"]).pooler_output,
        timestep=noise_share,
        img_ids=image_ids,
        txt_ids=torch.zeros(SHORT_LENGTH, 3, device=noisy.device),
        guidance=noisy.new_full((pictures,), GUIDANCE),
        joint_attention_kwargs={"attention_mask": pad_bias((SHORT_LENGTH, TEXT_LENGTH), (PATCHES, PATCHES)).to(noisy)},
    ).sample
    patches = tokens.view(pictures, LATENT_SIDE // 2, LATENT_SIDE // 2, LATENT_CHANNELS, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


FLUX = Recipe(
    kind="flux",
    pipeline="FluxPipeline",
    components={
        **DIFFUSERS_PARTS,
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
    },
    scheduler={
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    clip_padding={"tokenizer": "<|endoftext|>"},
    dtype=torch.bfloat16,
    build=_build,
    velocity=_velocity,
    empty_share=0.0,
    guidance=GUIDANCE,
    budget=Budget(steps=4000, batch=32, rate=1.5e-3),
)
