"""The toy model itself: a transformer over a signal and a text, and the pipeline that denoises with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

# Letters of a prompt that the model reads.
TOKENS = 8


class Attention(nn.Module):
    """Let every sample and every letter look at all of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        query, key, value = (
            linear(x_BTW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and a feed-forward, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTW = x_BTW + self.attn(self.norm(x_BTW))
        return x_BTW + self.down(functional.gelu(self.up(x_BTW)))


class ToyTransformer(ModelMixin, ConfigMixin):
    """Predict the velocity of a signal (batch, length, channels) at a time, given a text (batch, letters, text_dim)."""

    @register_to_config
    def __init__(self, channels: int = 4, width: int = 32, heads: int = 4, layers: int = 2, text_dim: int = 8) -> None:
        super().__init__()
        self.signal_in, self.text_in, self.time_in = (nn.Linear(n, width) for n in (channels, text_dim, 1))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.signal_out = nn.Linear(width, channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """Return the velocity in a tuple, whatever `return_dict` says."""
        time = self.time_in((timestep / 1000).to(hidden_states.dtype)[:, None, None])
        x_BTW = torch.cat([self.text_in(encoder_hidden_states), self.signal_in(hidden_states) + time], dim=1)
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return (self.signal_out(x_BTW[:, encoder_hidden_states.shape[1] :]),)


class ToyPipeline(DiffusionPipeline):
    """Denoise signals."""

    def __init__(self, transformer: ToyTransformer, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt_embeds: Tensor, length: int, num_inference_steps: int, generators: list[torch.Generator]
    ) -> Tensor:
        """Return one signal (length, channels) for each prompt."""
        shape = length, self.transformer.config.channels
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        signals, prompt_embeds = noise.to(self.transformer.dtype), prompt_embeds.to(self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            velocity = self.transformer(signals, time.expand(len(signals)), prompt_embeds)[0]
            signals = self.scheduler.step(velocity, time, signals, return_dict=False)[0]
        return signals


def make_toy_pipeline(folder: Path) -> Path:
    """Save a pipeline with random weights in the folder; returns it."""
    torch.manual_seed(0)
    pipeline: Any = ToyPipeline(ToyTransformer().to(torch.bfloat16), FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(folder)
    return folder


# diffusers looks in a component's own module for the base classes that it may have.
__all__ = ["SchedulerMixin", "ToyPipeline", "ToyTransformer", "make_toy_pipeline"]
