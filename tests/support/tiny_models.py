"""Tiny random transformers of every shape that the shard plans tell apart, saved as pipeline folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

# 12 heads are divisible by 2, 3 and 4; 12 heads of 8 make a width of 96 and a feed-forward width of 384.
HEADS, HEAD_DIM = 12, 8
TEXT, POOLED, CHANNELS = 24, 20, 16

FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "in_channels": CHANNELS,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),  # adds up to the head's width
}
SD3 = {
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": HEADS * HEAD_DIM,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 16,
}
SD35 = SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}

# kind -> (model's name, transformer class, configuration)
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "flux": ("flux", FluxTransformer2DModel, FLUX),
    "sd3": ("sd3", SD3Transformer2DModel, SD3),
    "sd35": ("sd3", SD3Transformer2DModel, SD35),
}


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Build a transformer with random weights.

    Weights are tripled, so that the blocks and not the residual stream decide the output and a wrong block shows.
    """
    torch.manual_seed(seed)
    _, model_class, config = KINDS[kind]
    model = model_class(**(config | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "transformer_blocks" in name:
            parameter.mul_(3)
    return model


def save(kind: str, folder: Path, *, max_shard_size: str = "10GB", **changes: Any) -> Path:
    """Save a transformer under the folder of a pipeline; returns that folder."""
    build(kind, **changes).save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    return folder


def example_inputs(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the keyword arguments of one forward: two samples, 5 text tokens, an image of 4 x 4 patches."""
    torch.manual_seed(1)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 5, TEXT, dtype=dtype),
        "pooled_projections": torch.randn(2, POOLED, dtype=dtype),
        "return_dict": False,
    }
    if kind != "flux":
        return inputs | {
            "hidden_states": torch.randn(2, CHANNELS, 8, 8, dtype=dtype),
            "timestep": torch.tensor([500.0, 500.0], dtype=dtype),
        }
    return inputs | {
        "hidden_states": torch.randn(2, 16, CHANNELS, dtype=dtype),
        "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "guidance": torch.tensor([3.5, 3.5]),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    }


def louder_records(kind: str, count: int) -> list[dict[str, Any]]:
    """Return calibration records of growing loudness, the same ones for the same count."""
    base = example_inputs(kind)
    return [{"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + i)}} for i in range(count)]
