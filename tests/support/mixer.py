"""Two layers behind each other and one that stays float, with records of steps: enough to choose schemes for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant_core.structure import ModelStructure

STRUCTURE = ModelStructure(model_class="Mixer")
STEPS, PER_STEP, TOKENS, WIDTH = 3, 12, 32, 64


class Mixer(nn.Module):
    """Two layers behind each other, wide enough that the sum over channels and tokens is not a matter of luck."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.second(torch.relu(self.first(x))))


def records() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    shape = (1, TOKENS, WIDTH)
    return [
        {"args": [torch.randn(shape, generator=generator) * (1 + step)], "timestep_idx": step}
        for step in range(STEPS)
        for _ in range(PER_STEP)
    ]
