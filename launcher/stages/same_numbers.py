"""Notice at once when the ranks of one copy of the model no longer hold the same numbers.

All ranks of a copy hold the transformer's output whole, after the same sums, so it is the same on each to the last
bit. Where it is not, their shards will not fit together, and without this check the merge would be the first to say so,
hours later. What it costs: a digest of one output for each forward, and one exchange of texts for each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from launcher.files.digests import digest_of_tensor, digest_of_text
from launcher.ranks.process_group import Ranks
from quant_core.errors import VerificationError


class SameNumbers:
    """Note what a transformer puts out on this rank, and compare it with the other ranks of its copy.

    step_source: returns the denoising step that the transformer is called for.
    """

    def __init__(self, ranks: Ranks, transformer: nn.Module, step_source: Callable[[], int]) -> None:
        self._ranks, self._step_source = ranks, step_source
        self._seen: list[tuple[int, str]] = []
        self._hook = transformer.register_forward_hook(self._note) if ranks.mesh.tp_size > 1 else None

    def check(self, where: str) -> None:
        """Compare what was noted since the last time, and forget it; all ranks of the copy call it together.

        Raises VerificationError on all of them, naming who holds what, and the first step in which they differ.
        """
        seen, self._seen = self._seen, []
        if self._hook is None:
            return
        everyone: list[Any] = [None] * self._ranks.mesh.tp_size
        dist.all_gather_object(everyone, seen, group=self._ranks.tp_control)
        if all(other == everyone[0] for other in everyone):
            return
        raise VerificationError(
            f"the ranks of one copy of the model hold different numbers: {self._who(everyone)}",
            where=f"{where}, denoising step {_first_difference(everyone)}",
            why="the transformer's output must be the same on all of them to the last bit, or their shards do not fit",
            advice="run the same command again, it goes on with this batch; if it ends here again, compare the cards, "
            "drivers and packages of these ranks, and use a scheduler that draws its noise from the given generator",
        )

    def close(self) -> None:
        """Stop noting."""
        if self._hook is not None:
            self._hook.remove()

    def _note(self, transformer: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._seen.append((self._step_source(), digest_of_text(repr(list(map(digest_of_tensor, tensors))))))

    def _who(self, everyone: list[Any]) -> str:
        """Name the ranks that agree with each other."""
        alike: dict[str, list[int]] = {}
        for rank, seen in zip(self._ranks.mesh.tp_ranks, everyone):
            alike.setdefault(repr(seen), []).append(rank)
        return " | ".join(f"rank {', '.join(map(str, ranks))}" for ranks in alike.values())


def _first_difference(everyone: list[list[tuple[int, str]]]) -> int:
    """Return the step of the first forward that is not the same on all ranks."""
    differing = (notes for notes in zip(*everyone) if len(set(notes)) > 1)
    return next((notes[0][0] for notes in differing), min(map(len, everyone)))
