"""A model of three linear layers, its calibration records, and sessions on it: the smallest thing to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant_core import SaveProcessorConfig, SessionConfig, schemes

STEPS = 4
SCHEMES: dict[str, Any] = {name: scheme.config for name, scheme in schemes.SCHEMES.items()}


class SmallModel(nn.Module):
    """8 features in, 8 out; `first` has a bias, `second` has none, `last` stays float; a norm, and a buffer."""

    shift: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("shift", torch.zeros(8))
        self.calls = 0
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.norm(self.second(torch.relu(self.first(x))) + self.shift))


def records(dtype: torch.dtype = torch.float32, per_step: int = 2) -> list[dict[str, Any]]:
    """Return records of STEPS steps, later steps with wider inputs, as a dump holds them."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"args": [(torch.randn(1, 5, 8, generator=generator) * (1 + step)).to(dtype)], "timestep_idx": step}
        for step in range(STEPS)
        for _ in range(per_step)
    ]


def session(scheme: str, output: Path | None = None, *, save: dict[str, Any] | None = None, **options: Any) -> Any:
    """Ask for a scheme on the records; `options` go to the scheme, `save` to the save processor."""
    dtype = options.pop("dtype", torch.float32)
    numerics = options.pop("numerics", "float32")
    processors = {scheme: SCHEMES[scheme](**options)}
    if output is not None:
        processors["save"] = SaveProcessorConfig(output_path=str(output), **(save or {}))
    return SessionConfig(processor_cfg_map=processors, calib_data=records(dtype), numerics=numerics)
