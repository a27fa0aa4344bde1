"""Find out how much memory a computation takes at its worst, without doing it.

On the meta device every operation makes tensors with a shape and no numbers. Whoever watches each of them come and go
knows how many bytes would have been alive at once. Attention is the exception: the meta device computes it step by
step and would count a table of all pairs of tokens, which no fused kernel holds, so its output is made directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes that were alive at once of what `compute` made; it works on meta tensors."""
    with torch.no_grad(), _FusedAttention(), _Watch() as watch:
        compute()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Count the storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _works_in_place(func) and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]  # it makes nothing, there is nothing to compute, and asking torch takes a while
        given = {_storage(leaf).cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and _storage(leaf).cdata not in given:
                reference = _storage(leaf)
                self._alive[reference.cdata] = (reference, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


class _FusedAttention(TorchFunctionMode):
    """Let attention make its output and nothing else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) >= 3 else [*args, *(kwargs or {}).values()][:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _works_in_place(operation: Any) -> bool:
    """Tell whether an operation changes the numbers of its first argument and nothing else: no shape, no storage."""
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    schema = operation._schema
    return schema.is_mutable and schema.name.endswith("_") and torch.Tag.inplace_view not in operation.tags


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
