"""Train a transformer and its text encoders by rectified flow: from noise to a picture's latents on a straight line.

A noisy latent is (1 - s) x + s noise, with s the share of noise, and the transformer learns the direction noise - x.
Latents are encoded once, several placements of each scene, because drawing and encoding cost more than a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scripts.tiny_training.drawing import draw, random_placements
from scripts.tiny_training.recipe import Recipe
from scripts.tiny_training.steps import Budget, Setting, seeded, train
from scripts.tiny_training.text import repeat_last_position, token_ids

PLACEMENTS = 16  # of each scene
UNIFORM_SHARE = 0.3  # of the noise shares; the others are logit-normal, denser in the middle where it matters most
_ENCODED_AT_ONCE = 64  # pictures


@torch.no_grad()
def encode_scenes(vae: Any, setting: Setting) -> Tensor:
    """Draw each scene several times and return the latents: (scenes, placements, 16, 8, 8), of variance 1."""
    pictures = [scene for scene in setting.scenes for _ in range(setting.placements)]
    places = random_placements(len(pictures), seeded(setting.seed, "placements"))
    parts = []
    for first in range(0, len(pictures), _ENCODED_AT_ONCE):
        chunk = slice(first, first + _ENCODED_AT_ONCE)
        drawn = 2 * draw(pictures[chunk], places[chunk]) - 1
        parts.append(vae.encode(drawn.to(vae.device)).latent_dist.mode())
    latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.unflatten(0, (len(setting.scenes), setting.placements))


def noise_shares(count: int, generator: torch.Generator) -> Tensor:
    """Draw shares of noise between 0 and 1: (count,)."""
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < UNIFORM_SHARE, uniform, logit_normal)


def train_transformer(recipe: Recipe, vae: Any, setting: Setting, budget: Budget) -> nn.ModuleDict:
    """Train what `recipe` builds, on the device of `vae`, and return it under its component names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        models = recipe.build().to(vae.device)
    latents = encode_scenes(vae, setting)
    captions = [*(scene.caption for scene in setting.scenes), ""]
    tokenizers = sorted(recipe.tokenizers(setting.work).iterdir())
    ids = {folder.name: token_ids(folder, captions).to(vae.device) for folder in tokenizers}

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(setting.seed, recipe.pipeline, step)
        return _flow_loss(recipe, models, latents, ids, budget.batch, generator)

    name = f"{recipe.pipeline}, seed {setting.seed}, {len(setting.scenes)} scenes, {setting.placements} placements"
    train(models, loss_of_step, budget, setting.work / f"{recipe.kind}.pt", name, setting.report)
    for component, (_, class_name) in recipe.components.items():
        if class_name.startswith("CLIPText"):
            repeat_last_position(models[component])
    return models.eval()


def _flow_loss(
    recipe: Recipe,
    models: nn.ModuleDict,
    latents: Tensor,
    ids: Mapping[str, Tensor],
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    scene = torch.randint(len(latents), (batch,), generator=generator)
    placement = torch.randint(latents.shape[1], (batch,), generator=generator)
    is_empty = torch.rand(batch, generator=generator) < recipe.empty_share
    share = noise_shares(batch, generator).to(latents)
    noise = torch.randn(batch, *latents.shape[2:], generator=generator).to(latents)
    picture = latents[scene, placement]
    noisy = torch.lerp(picture, noise, share[:, None, None, None])
    caption = torch.where(is_empty, len(latents), scene)
    velocity = recipe.velocity(models, {name: rows[caption] for name, rows in ids.items()}, noisy, share)
    return (velocity - (noise - picture)).square().mean()
