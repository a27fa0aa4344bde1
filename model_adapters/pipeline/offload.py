"""Let a transformer that is larger than its card run on it, block by block.

A diffusion transformer is a list of blocks that run one after the other. Each block's weights are copied to the card
when its forward begins and forgotten there when it ends; the host keeps its own, so nothing is copied back. What is
no block (embedders, the last layers) stays on the card.

The copies hang on forward hooks of the blocks, and nothing below a block is touched: a quantizer may exchange the
class of a linear inside while this is on. Libraries that replace `forward` on every leaf would win over the exchanged
class and switch the quantizer off without a word.

Worked example: FLUX.1-dev has 22.2 GiB in bfloat16. Its largest block has 0.63 GiB and what is no block 0.2 GiB, so
under 1 GiB of weights is on the card at any time, at the price of 22 GiB over the bus for each forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@contextmanager
def run_block_by_block(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Run a model that lies on the host on `device` inside the block, one of its blocks at a time."""
    blocks = blocks_of(model)
    inside = {module for block in blocks for module in block.modules()}
    rest = [module for module in model.modules() if module not in inside]
    with visiting(blocks, device):
        _move(rest, device)
        try:
            yield
        finally:
            _move(rest, "cpu")


@contextmanager
def visiting(blocks: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Have each block's weights on `device` only while the block runs."""
    hooks = [hook for block in blocks for hook in _visit(block, device)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of the model's own module lists, which is where transformers keep their blocks."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def _visit(block: nn.Module, device: torch.device | str) -> list[Any]:
    """Hook a block so that its weights are on the device while it runs; returns the hooks."""
    at_home: list[_Place] = []

    def arrive(module: nn.Module, args: Any) -> None:
        at_home.extend(_move(module.modules(), device))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for held, name, tensor in at_home:
            held[name] = tensor
        at_home.clear()

    # A block that fails must give its memory back too, or the error message of a full card is the last one.
    return [block.register_forward_pre_hook(arrive), block.register_forward_hook(leave, always_call=True)]


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    held: MutableMapping[str, Any]
    name: str
    tensor: Tensor


def _move(modules: Iterable[nn.Module], device: torch.device | str) -> list[_Place]:
    """Put copies on the device in the place of the modules' own tensors; returns those and their places.

    Another object takes the place, because not every device's memory can be given to a tensor of the host.
    """
    places = [_Place(*place) for module in modules for place in _held(module)]
    for held, name, tensor in places:
        moved = tensor.detach().to(device)
        held[name] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return places


def _held(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, Tensor]]:
    for held in (module._parameters, module._buffers):
        yield from ((held, name, tensor) for name, tensor in held.items() if tensor is not None)
