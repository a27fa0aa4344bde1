"""Say what one kind of pipeline is made of and how its transformer reads text: FLUX and SD3 each fill in a Recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.tiny_training.steps import Budget

DIFFUSERS_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
}
LATENT_SIDE = 8  # 64 pixels
PATCHES = 16  # 2 x 2 latents each


@dataclass(frozen=True)
class Recipe:
    """Name the parts of a pipeline as model_index.json does, and say how to build and run those that are trained.

    `kind` is our own name for it. `build` makes the text encoders and the transformer, untrained, under their component
    names. `velocity` runs them: (models, token ids by tokenizer, noisy latents of (pictures, 16, 8, 8), share of noise
    of (pictures,)) to the predicted velocity, shaped as the latents. `empty_share`: share of training pictures whose
    caption is dropped, for classifier-free guidance; `guidance`: the scale that the model wants.
    """

    kind: str
    pipeline: str
    components: Mapping[str, tuple[str, str]]
    scheduler: Mapping[str, object]
    clip_padding: Mapping[str, str]
    dtype: torch.dtype
    build: Callable[[], nn.ModuleDict]
    velocity: Callable[[nn.ModuleDict, Mapping[str, Tensor], Tensor, Tensor], Tensor]
    empty_share: float
    guidance: float
    budget: Budget

    def tokenizers(self, work: Path) -> Path:
        """Return the folder of the tokenizers, each in a folder of its component's name."""
        return work / f"{self.kind}_tokenizers"


@torch.no_grad()
def start_as_identity(transformer: nn.Module) -> nn.Module:
    """Set the modulations and the output to zero, so that a transformer starts as a chain of identities."""
    for name, module in transformer.named_modules():
        is_modulation = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"))
        if isinstance(module, nn.Linear) and (is_modulation or name == "proj_out"):
            module.weight.zero_()
            module.bias.zero_()
    return transformer
