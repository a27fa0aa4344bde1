"""Train the autoencoder that both pipelines share: 64 x 64 pixels to 8 x 8 latents of 16 channels and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.tiny_training.drawing import Scene, draw, random_placements, split_scenes
from scripts.tiny_training.steps import Budget, Setting, seeded, train

WIDTHS = (16, 16, 32, 32)  # three halvings: 8 pixels to a latent
LATENT_CHANNELS = 16
BUDGET = Budget(steps=2500, batch=16, rate=2.5e-3)
ABSOLUTE, DIVERGENCE = 0.1, 1e-3  # weights of the absolute error and of the KL term, beside the squared error
_MEASURED = 64  # pictures


def build_vae() -> AutoencoderKL:
    """Build the autoencoder, untrained."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),  # pyright: ignore[reportArgumentType]
        block_out_channels=WIDTHS,  # pyright: ignore[reportArgumentType]
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def draw_batch(scenes: tuple[Scene, ...], count: int, generator: torch.Generator) -> tuple[list[Scene], Tensor]:
    """Choose `count` scenes and draw them: the scenes, and (count, 3, 64, 64) between -1 and 1, as a VAE reads it."""
    chosen = [scenes[int(i)] for i in torch.randint(len(scenes), (count,), generator=generator)]
    return chosen, 2 * draw(chosen, random_placements(count, generator)) - 1


def train_vae(setting: Setting, budget: Budget = BUDGET) -> AutoencoderKL:
    """Train the autoencoder, or load it where a finished one is, and measure how its latents scale."""
    seed, device = setting.seed, setting.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = build_vae()
        vae.to(device)

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(seed, "vae", step)
        _, pictures = draw_batch(setting.scenes, budget.batch, generator)
        pictures = pictures.to(device)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pictures
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.square().mean() + ABSOLUTE * error.abs().mean() + DIVERGENCE * divergence

    name = f"vae, seed {seed}, widths {WIDTHS}"
    train(vae, loss_of_step, budget, setting.work / "vae.pt", name, setting.report)
    _measure_latents(vae, setting)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def _measure_latents(vae: Any, setting: Setting) -> None:
    """Write the scale and shift that bring the latents to mean 0 and variance 1 into the configuration."""
    _, held_out = split_scenes()
    _, pictures = draw_batch(setting.scenes, _MEASURED, seeded(setting.seed, "latents"))
    latents = vae.encode(pictures.to(vae.device)).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    _, unseen = draw_batch(held_out, _MEASURED, seeded(setting.seed, "unseen"))
    error = vae.decode(vae.encode(unseen.to(vae.device)).latent_dist.mode()).sample.cpu() - unseen
    setting.report(f"vae returns unseen pictures at {10 * math.log10(4 / error.square().mean().item()):.1f} dB")
