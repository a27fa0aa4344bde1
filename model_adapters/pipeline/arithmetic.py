"""Give a transformer an arithmetic of its own inside a pipeline whose other parts compute in float32.

To see what quantization does, everything else must stay the same: latents, scheduler and VAE in float32, for every
model that is compared. A pipeline does that by itself when its embeddings and its VAE are float32. What is left is the
transformer, which wants its inputs in the dtype of its weights.

    own_arithmetic    inputs rounded to the model's dtype, output widened to float32: as the model is served
    other_arithmetic  the same rounded inputs, but every layer with weights widened while it runs (narrowed, for a
                      float32 model): another legitimate way to compute the same model. How far its pictures are from
                      the first's is the noise floor; a difference below it means nothing.

Vectors (timestep, guidance: one number a sample) stay exact, as in a pipeline of the model's own dtype or closer.
FLUX rounds them to the dtype of its first layer's output before it embeds them, and time that is rounded elsewhere
would be another time, not another arithmetic. So the first layer that runs keeps the model's dtype.

Weights are converted layer by layer and forgotten afterwards: the floor needs no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def own_arithmetic(transformer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Call the transformer with inputs of its `dtype`, and return its output as float32, inside the block."""

    def narrow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    def widen(module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, torch.float32)

    with ExitStack() as stack:
        # Before all other hooks: whoever records inputs is to see what the model computes with.
        hook = transformer.register_forward_pre_hook(narrow, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.callback(transformer.register_forward_hook(widen).remove)
        yield


@contextmanager
def other_arithmetic(transformer: nn.Module, dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Compute every layer with weights, but the first, in another dtype than the model's `dtype`, inside the block.

    Gives the dtype: float32, or bfloat16 for a float32 model.
    """
    other = other_dtype(dtype)
    conversion = _Conversion(other)
    with ExitStack() as stack:
        stack.callback(transformer.register_forward_pre_hook(conversion.begin).remove)
        for module in transformer.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(conversion.enter, with_kwargs=True).remove)
                # The first to act on the way out, as it was the last on the way in; and if the layer fails, too.
                after = module.register_forward_hook(conversion.leave, prepend=True, always_call=True)
                stack.callback(after.remove)
        yield other


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the noise floor of a model of this dtype computes in."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


class _Conversion:
    """Exchange a layer's parameters while it runs. One layer runs at a time, and none runs inside another."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.first: nn.Module | None = None
        self.own: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def begin(self, transformer: nn.Module, args: Any) -> None:
        """Forget which layer came first: a forward begins."""
        self.first = None

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Give a layer converted parameters and return converted arguments; the first one keeps its own."""
        self.first = self.first or module
        if module is self.first:
            return None
        self.own[module] = dict(module._parameters)
        for name, parameter in self.own[module].items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = nn.Parameter(parameter.to(self.dtype), requires_grad=False)
        return _cast(args, self.dtype, least_dims=1), _cast(kwargs, self.dtype, least_dims=1)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give a layer its own parameters back."""
        module._parameters.update(self.own.pop(module, {}))


def _cast(value: Any, dtype: torch.dtype, least_dims: int = 2) -> Any:
    """Return nested data with its floating tensors of at least so many dimensions in the dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim >= least_dims else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype, least_dims) for item in value)
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype, least_dims) for key, item in value.items()}
    return value
