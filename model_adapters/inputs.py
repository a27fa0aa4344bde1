"""The inputs of one forward of a transformer, by how often they change: what a dump holds how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TransformerInputs:
    """Group the named inputs: new in every step, new for every batch of prompts, the same in the whole run."""

    of_step: Mapping[str, Tensor]
    of_prompt: Mapping[str, Tensor]
    of_run: Mapping[str, Tensor]

    def arguments(self) -> dict[str, Tensor]:
        """Return all of them, as keyword arguments."""
        return {**self.of_step, **self.of_prompt, **self.of_run}

    def dump_bytes(self, batches: int, steps: int) -> int:
        """Return the bytes of a dump, which holds each different tensor once."""
        of_step, of_prompt, of_run = (size(part) for part in (self.of_step, self.of_prompt, self.of_run))
        return batches * (steps * of_step + of_prompt) + of_run


def size(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of named tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
