"""Turn a whole diffusers transformer into one tensor-parallel rank's part of it.

What is left are ordinary linear layers of local size, with each collective in a forward hook of the module it
belongs to. A quantizer sees a normal layer, may change its class in place, and the hook stays. A quantizer that
replaces a module loses the hook without a word and the model computes nonsense, so the collectives a model was given
are recorded and `assert_collectives` looks whether all are still there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_adapters.parallel.shard_plan import ShardPlan, head_count
from quant_core.errors import DistributedError, few
from quant_core.naming import matches
from quant_core.parallel.sharding import Shard, Style


class Combine(str, Enum):
    """Name how the local outputs of all tensor-parallel ranks become the output of the undivided module."""

    SUM = "sum"
    GATHER = "gather"


_COMBINE_OF_STYLE = {
    Style.ROW: Combine.SUM,
    Style.ROW_PACKED: Combine.SUM,
    Style.COL_GATHER: Combine.GATHER,
}


@dataclass(frozen=True, eq=False)
class Collective:
    """Combine a module's local outputs (..., features) over a group of `size` ranks, as a forward hook.

    On the meta device there is nothing to exchange, and only the shape changes.
    """

    combine: Combine
    group: dist.ProcessGroup | None
    size: int

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the sum over the ranks, or their outputs side by side on the last dimension in rank order."""
        local = output.contiguous()
        if local.is_meta:
            return local if self.combine is Combine.SUM else torch.cat([local] * self.size, dim=-1)
        if self.combine is Combine.SUM:
            dist.all_reduce(local, group=self.group)
            return local
        # The list form is the one that every backend and every supported torch has under one name.
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat(parts, dim=-1)


_COLLECTIVES: WeakKeyDictionary[nn.Module, Mapping[str, Collective]] = WeakKeyDictionary()


def make_local(
    model: nn.Module, plan: ShardPlan, *, tp_rank: int, tp_size: int, tp_group: dist.ProcessGroup | None
) -> dict[str, Shard]:
    """Cut a whole transformer (real, or on the meta device) down to this rank's part in place.

    Returns the shard of every divided linear layer by name. With `tp_size` 1 the model stays as it is, without a hook.
    Raises ConfigurationError when the plan does not divide evenly, before anything is changed.
    """
    shards = plan.resolve(model, tp_rank, tp_size)
    if tp_size == 1:
        return shards
    for name, shard in shards.items():
        _cut_linear(model.get_submodule(name), shard)
    for name, module in model.named_modules():
        if matches(name, plan.local_heads):
            module.heads = head_count(module) // tp_size  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    _COLLECTIVES[model] = _attach(model, _planned_combines(model, plan, shards), tp_group, tp_size)
    return shards


def collectives(model: nn.Module) -> Mapping[str, Collective]:
    """Return the collectives that `make_local` gave the model, by module name; none for a whole model."""
    return _COLLECTIVES.get(model, {})


def assert_collectives(model: nn.Module) -> None:
    """Check that every module that was given a collective still has it.

    Raises DistributedError naming the modules that lost theirs (a replaced module takes no hook along).
    """
    lost = [name for name, collective in collectives(model).items() if not _has_hook(model, name, collective)]
    if lost:
        raise DistributedError(
            f"{len(lost)} modules lost the collective that combines their local outputs",
            where=f"{type(model).__name__}: {few(lost, between=', ', shown=5)}",
            why="a module was replaced; its forward hook stayed behind, and each rank would go on with a part",
            advice="change modules in place (their class), or divide the model again after replacing them",
        )


def _cut_linear(linear: nn.Module, shard: Shard) -> None:
    assert isinstance(linear, nn.Linear), "a plan resolves to linear layers"
    weight = shard.take_weight(linear.weight.detach())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    if linear.bias is not None:
        bias = shard.take_bias(linear.bias.detach())
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def _planned_combines(model: nn.Module, plan: ShardPlan, shards: Mapping[str, Shard]) -> dict[str, Combine]:
    gathered = {name: Combine.GATHER for name, _ in model.named_modules() if matches(name, plan.gather_outputs)}
    styled = {name: _COMBINE_OF_STYLE.get(shard.style) for name, shard in shards.items()}
    return gathered | {name: combine for name, combine in styled.items() if combine}


def _attach(
    model: nn.Module, combines: Mapping[str, Combine], group: dist.ProcessGroup | None, size: int
) -> dict[str, Collective]:
    attached = {name: Collective(combine, group, size) for name, combine in combines.items()}
    for name, collective in attached.items():
        model.get_submodule(name).register_forward_hook(collective)
    return attached


def _has_hook(model: nn.Module, name: str, collective: Collective) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return any(hook is collective for hook in module._forward_hooks.values())
