"""The tiny Stable Diffusion 3: three blocks of two streams, three text encoders, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from scripts.tiny_training.recipe import DIFFUSERS_PARTS, LATENT_SIDE, PATCHES, Recipe, start_as_identity
from scripts.tiny_training.steps import Budget
from scripts.tiny_training.text import CLIP_LENGTH, SHORT_LENGTH, T5_WIDTH, build_t5, clip_config, pad_bias
from scripts.tiny_training.vae import LATENT_CHANNELS

CLIP_WIDTH = {"text_encoder": 32, "text_encoder_2": 64}  # together T5's width, as 768 + 1280 is under 4096
TEXT_LENGTH = 256  # tokens of T5; the pipeline's max_sequence_length
HEADS, HEAD_DIM = 4, 32


class WeightedJointAttention:
    """Joint attention as diffusers computes it, which in SD3's case reads no mask, with a bias on the keys."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend over (pictures, image tokens, width) and (pictures, text tokens, width); return both, as they came."""
        pairs = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
        query, key, value = (
            torch.cat([image(hidden_states), text(encoder_hidden_states)], 1)
            .unflatten(-1, (attn.heads, -1))
            .transpose(1, 2)
            for image, text in pairs
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        image, text = attended.transpose(1, 2).flatten(2).tensor_split([hidden_states.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def _build() -> nn.ModuleDict:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        pos_embed_max_size=LATENT_SIDE,  # patches a side: 128 pixels at most
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTH.values()),
    )
    encoders = {
        name: transformers.CLIPTextModelWithProjection(clip_config(width, layers=1))
        for name, width in CLIP_WIDTH.items()
    }
    return nn.ModuleDict({**encoders, "text_encoder_3": build_t5(), "transformer": start_as_identity(transformer)})


def _velocity(models: nn.ModuleDict, ids: Mapping[str, Tensor], noisy: Tensor, noise_share: Tensor) -> Tensor:
    said = [models[f"text_encoder{end}"](ids[f"tokenizer{end}"], output_hidden_states=True) for end in ("", "_2")]
    clip_tokens = torch.cat([output.hidden_states[-2] for output in said], -1)
    keys = pad_bias((PATCHES, PATCHES), (SHORT_LENGTH, CLIP_LENGTH), (SHORT_LENGTH, TEXT_LENGTH))
    transformer: Any = models["transformer"]
    transformer.set_attn_processor(WeightedJointAttention())
    velocity = transformer(
        hidden_states=noisy,
        encoder_hidden_states=torch.cat([clip_tokens, models["text_encoder_3"](ids["tokenizer_3"])[0]], 1),
        pooled_projections=torch.cat([output.text_embeds for output in said], -1),
        timestep=noise_share * 1000,
        joint_attention_kwargs={"attention_mask": keys.to(noisy)},
    ).sample
    return velocity


SD3 = Recipe(
    kind="sd3",
    pipeline="StableDiffusion3Pipeline",
    components={
        **DIFFUSERS_PARTS,
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
    },
    scheduler={"num_train_timesteps": 1000, "shift": 3.0},
    clip_padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    dtype=torch.float16,
    build=_build,
    velocity=_velocity,
    empty_share=0.1,
    guidance=3.0,  # the pipeline's own 7 overshoots on eight flat colours
    budget=Budget(steps=3000, batch=32, rate=1.5e-3),
)
