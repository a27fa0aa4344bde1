"""What the quantizer must know of the ranks around it: who holds which slice, and with whom to agree.

Groups are optional: without them every statistic is this process's own. They are expected to be groups for host
tensors (gloo); the statistics that travel are small, and one kind of group serves every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from quant_core.parallel.sharding import Shard, Style

# How ranks combine a statistic.
Reduction = Literal["min", "max", "sum"]
_OPS = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}
_WHOLE = Shard(Style.REPLICATED, rank=0, size=1)

# The histograms of all layers and steps are hundreds of megabytes; together travel at most 64 MiB of float64.
_TOGETHER = 2**23
_Part = tuple[Tensor, Callable[[Tensor], None]]

Group = Any  # torch.distributed.ProcessGroup, whose stub differs between torch versions


@dataclass(frozen=True)
class Parallel:
    """Describe this rank's place: the shard of each linear, and the groups that share its statistics.

    `scale_sync`: `local` lets each shard of a row-split layer have its own scales; `global` makes them those of the
    whole layer (spec: row-parallel layers).
    """

    shards: Mapping[str, Shard] = field(default_factory=dict)
    tp_group: Group | None = None
    dp_group: Group | None = None
    scale_sync: Literal["local", "global"] = "local"

    def shard(self, layer: str) -> Shard:
        """Return how the linear layer of that name is divided; whole unless said otherwise."""
        return self.shards.get(layer, _WHOLE)

    def scale_group(self, layer: str) -> Group | None:
        """Return the group over which this layer's scales must agree, or None when its own statistics suffice.

        Column-split layers see the whole input and own their rows, so only row-split ones may need it.
        """
        shared = self.scale_sync == "global" and self.shard(layer).split_dim == 1
        return self.tp_group if shared else None


def reduce_over(group: Group | None, op: Reduction, tensor: Tensor) -> Tensor:
    """Return the tensor reduced over the group, on the same device and in the same dtype; itself without a group."""
    if group is None:
        return tensor
    # gloo adds neither in float16 nor in bfloat16.
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    host = tensor.detach().to("cpu", dtype, copy=True)
    dist.all_reduce(host, op=_OPS[op], group=group)
    return host.to(tensor)


def gather_rows(group: Group | None, rows: Tensor) -> Tensor:
    """Return the rows of all ranks below each other, in the order of the ranks, on the host; without a group, its own.

    Ranks may have different numbers of rows, none too; what a row is must be the same everywhere.
    """
    if group is None:
        return rows
    host = rows.detach().to("cpu").contiguous()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(host)]), group=group)
    padded = host.new_zeros(int(max(counts)), *host.shape[1:])
    padded[: len(host)] = host
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[: int(count)] for piece, count in zip(pieces, counts)])


def count_before(group: Group | None, count: int) -> int:
    """Return what the ranks in front of this one in the group count together."""
    return 0 if group is None else int(gather_rows(group, torch.tensor([count]))[: dist.get_rank(group)].sum())


def reduce_many(group: Group | None, parts: Iterable[tuple[Reduction, Tensor, Callable[[Tensor], None]]]) -> None:
    """Reduce many small tensors with few collectives.

    Each part is an operation, a tensor and where to hand the result. All ranks of the group must give the same parts
    in the same order.
    """
    if group is None:
        return
    waiting: dict[Reduction, list[_Part]] = {}
    sizes: Counter[Reduction] = Counter()
    for op, tensor, put in parts:
        if sizes[op] + tensor.numel() > _TOGETHER:
            _reduce_together(group, op, waiting.pop(op, []))
            sizes[op] = 0
        waiting.setdefault(op, []).append((tensor, put))
        sizes[op] += tensor.numel()
    for op, items in sorted(waiting.items()):
        _reduce_together(group, op, items)


def _reduce_together(group: Group, op: Reduction, items: Sequence[_Part]) -> None:
    if not items:
        return
    flat = torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor, _ in items])
    dist.all_reduce(flat, op=_OPS[op], group=group)
    pieces = flat.split([tensor.numel() for tensor, _ in items])
    for (tensor, put), piece in zip(items, pieces):
        put(piece.reshape(tensor.shape).to(tensor))
