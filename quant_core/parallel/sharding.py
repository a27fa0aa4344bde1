"""Slice the tensors of one linear layer for one rank, and put the slices of all ranks together again.

Every tensor of a linear layer runs along the layer's output axis, its input axis, both or neither; `_AXES` is that
table. A style says which axis a group of `size` ranks divides: `col` and `col_gather` the output axis, `row` and
`row_packed` the input axis. Splitting and joining any tensor follows from these two facts alone.

Worked example: a float layer with 4 inputs and 2 outputs on 2 ranks, `y = W x + b`:

    W = [[1, 2, 3, 4],      b = [10, 20]        x = [1, 1, 1, 1]        y = [1+2+3+4+10, 5+6+7+8+20] = [20, 46]
         [5, 6, 7, 8]]

    col         rank 0 holds W[0:1], b[0:1] and computes [20]; rank 1 holds W[1:2], b[1:2] and computes [46].
    row         rank 0 holds W[:, 0:2], b and computes [1+2+10, 5+6+20] = [13, 31]; rank 1 holds W[:, 2:4] and no
                bias and computes [3+4, 7+8] = [7, 15]; the sum over the group is [20, 46]. If rank 1 kept the bias
                too, the sum would be [30, 66], and no shape would tell.
    row_packed  the input is a concatenation, say of blocks of width 2 and 2, and each rank holds its half of *each*
                block, because that is what the layers before it produce locally: rank 0 the columns 0 and 2,
                rank 1 the columns 1 and 3. The sum is the same; the slices are not those of `row`.

The bias lives on tensor-parallel rank 0: the local rank repeats on every node, so a bias on "local rank 0" would be
added once per node. A col-split layer's per-row scales are split with its rows; a row-split layer's are not: with a
global range all ranks hold the same ones, and only those can be joined into one (spec: tensor-parallel layouts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_core.errors import ConfigurationError, InputError, VerificationError


class Style(str, Enum):
    """Name how a linear layer is divided over a tensor-parallel group (spec: tensor-parallel layouts)."""

    COL = "col"
    ROW = "row"
    COL_GATHER = "col_gather"
    ROW_PACKED = "row_packed"
    REPLICATED = "replicated"


class _Axes(NamedTuple):
    """Which dimension of a tensor, counted from the end, runs along the layer's outputs and inputs."""

    outputs: int | None
    inputs: int | None


_AXES = {
    "weight": _Axes(-2, -1),  # (O, I)
    "bias": _Axes(-1, None),  # (O,)
    "weight_scale": _Axes(-2, None),  # (O, 1)
    "weight_offset": _Axes(-2, None),  # (O, 1)
    "input_scale": _Axes(None, None),  # (1,) or (T, 1)
    "input_offset": _Axes(None, None),  # (1,) or (T, 1)
    "quant_bias": _Axes(-1, None),  # (O,) or (T, O)
    "deq_scale": _Axes(-1, None),  # (O,) or (T, O)
    "mul_scale": _Axes(None, -1),  # (I,)
    "scale": _Axes(-2, None),  # (heads, 1): an attention's heads follow the outputs of its query layer
    "offset": _Axes(-2, None),  # (heads, 1)
}

_COL_STYLES = frozenset({Style.COL, Style.COL_GATHER})
_ROW_STYLES = frozenset({Style.ROW, Style.ROW_PACKED})


class Slice(NamedTuple):
    """Describe one contiguous range `[start, stop)` of one dimension of a full tensor."""

    dim: int
    start: int
    stop: int


def cut(source: Any, parts: Sequence[Slice]) -> Tensor:
    """Cut the parts out of a tensor (or a safetensors slice, which reads nothing else) and concatenate them.

    No part means the whole. The result is contiguous and owns its memory, so the source can be freed.
    """
    if not parts:
        return source[...].clone().contiguous()
    pieces = [source[(slice(None),) * part.dim + (slice(part.start, part.stop),)] for part in parts]
    whole = torch.cat(pieces, dim=parts[0].dim) if len(pieces) > 1 else pieces[0].clone()
    return whole.contiguous()


@dataclass(frozen=True)
class Shard:
    """Say which part of one linear layer rank `rank` of a tensor-parallel group of `size` holds.

    `blocks` are the full widths of the concatenated inputs of a `row_packed` layer, in order.
    """

    style: Style
    rank: int
    size: int
    blocks: tuple[int, ...] = ()

    @property
    def split_dim(self) -> int | None:
        """Return the dimension of the (O, I) weight that is split: 0, 1 or None."""
        return 0 if self.style in _COL_STYLES else 1 if self.style in _ROW_STYLES else None

    @property
    def has_bias(self) -> bool:
        """Tell whether this rank holds the layer's bias, if the layer has one."""
        return self.style not in _ROW_STYLES or self.rank == 0

    def divides(self, tensor: str, ndim: int) -> bool:
        """Tell whether a tensor of that name and number of dimensions is in parts on the ranks, or whole on each."""
        return self._dim(tensor, ndim) is not None

    def slices(self, tensor: str, shape: Sequence[int]) -> tuple[Slice, ...]:
        """Describe this rank's part of the tensor called `tensor` with full shape `shape`.

        The parts are to be concatenated on their common dimension; none means the whole tensor. For the 4-input
        layer above, `row_packed` with blocks (2, 2) on rank 1 gives (1, 1, 2) and (1, 3, 4).
        Raises ConfigurationError when the dimension or a packed block is not divisible by the group's size.
        """
        dim = self._dim(tensor, len(shape))
        if dim is None:
            return ()
        found, offset = [], 0
        for width in self._blocks(tensor, dim, shape[dim]):
            part = width // self.size
            start = offset + self.rank * part
            found.append(Slice(dim, start, start + part))
            offset += width
        return tuple(found)

    def weight_slices(self, shape: Sequence[int]) -> tuple[Slice, ...]:
        """Describe this rank's part of the (O, I) weight; see `slices`."""
        return self.slices("weight", shape)

    def local_shape(self, tensor: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of this rank's part of a tensor with full shape `shape`."""
        local = list(shape)
        if parts := self.slices(tensor, shape):
            local[parts[0].dim] = sum(part.stop - part.start for part in parts)
        return tuple(local)

    def take(self, tensor: str, full: Tensor) -> Tensor | None:
        """Cut this rank's part of `full`, contiguous and owning its memory; None for a bias that lives elsewhere."""
        if tensor == "bias" and not self.has_bias:
            return None
        return cut(full, self.slices(tensor, full.shape))

    def take_weight(self, weight: Tensor) -> Tensor:
        """Cut this rank's part of the (O, I) weight, contiguous and owning its memory."""
        taken = self.take("weight", weight)
        assert taken is not None, "only a bias may be absent from a rank"
        return taken

    def take_bias(self, bias: Tensor) -> Tensor | None:
        """Cut this rank's part of the (O,) bias; None for row styles on ranks above 0."""
        return self.take("bias", bias)

    def _dim(self, tensor: str, ndim: int) -> int | None:
        """Return which dimension, counted from the front, of a tensor of `ndim` dimensions is split."""
        if self.split_dim is None:
            return None
        if tensor not in _AXES:
            raise InputError(
                f"a split linear layer has no tensor called '{tensor}'",
                why="nobody knows which of its dimensions follows the layer's outputs or inputs",
                advice=f"one of {', '.join(_AXES)}",
            )
        axes = _AXES[tensor]
        from_end = axes.outputs if self.split_dim == 0 else axes.inputs
        return None if from_end is None else ndim + from_end

    def _blocks(self, tensor: str, dim: int, width: int) -> tuple[int, ...]:
        blocks = self.blocks if self.style is Style.ROW_PACKED else (width,)
        uneven = [block for block in blocks if block % self.size]
        if uneven or sum(blocks) != width:
            raise ConfigurationError(
                f"dimension {dim} of a {self.style.value} {tensor} cannot be split over {self.size} ranks",
                where=f"width {width}, blocks {list(blocks)}",
                why="the blocks must add up to the width and each must be divisible by the number of ranks",
                advice="choose another tensor-parallel size",
            )
        return blocks


def join(name: str, parts: Sequence[Tensor | None], shard: Shard) -> Tensor | None:
    """Put the parts of one tensor, in tensor-parallel rank order, together again.

    `name` is the tensor's name, of which the last component says what it is; `shard` is any rank's shard. A split
    dimension is concatenated (block by block if packed), a row-split bias must exist exactly once, the partial
    `quant_bias` of row-split layers add up, and everything else must be the same on all ranks. None when every part
    is None. Raises VerificationError naming the ranks that disagree.
    """
    tensor = name.rpartition(".")[2]
    if all(part is None for part in parts):
        return None
    if tensor == "bias" and shard.style in _ROW_STYLES:
        return _only_part(name, parts)
    whole = _all_parts(name, parts)
    dim = shard._dim(tensor, whole[0].ndim)
    if dim is not None:
        return torch.cat(_in_block_order(whole, dim, shard), dim=dim)
    if tensor == "quant_bias" and shard.style in _ROW_STYLES:
        # Offset times row sum of the codes is linear in the columns, and only rank 0's part contains the bias.
        return torch.stack(whole).sum(dim=0, dtype=whole[0].dtype)
    return _same_part(name, whole)


def _in_block_order(parts: Sequence[Tensor], dim: int, shard: Shard) -> list[Tensor]:
    """Order the pieces block by block, rank by rank: [A0 B0] and [A1 B1] give A0 A1 B0 B1."""
    if shard.style is not Style.ROW_PACKED:
        return list(parts)
    widths = [block // shard.size for block in shard.blocks]
    pieces = [part.split(widths, dim=dim) for part in parts]
    return [piece for block in zip(*pieces) for piece in block]


def _all_parts(name: str, parts: Sequence[Tensor | None]) -> list[Tensor]:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        missing = [rank for rank, part in enumerate(parts) if part is None]
        raise _disagreement(name, f"tensor-parallel ranks {missing} do not have it")
    return present


def _only_part(name: str, parts: Sequence[Tensor | None]) -> Tensor:
    owners = [rank for rank, part in enumerate(parts) if part is not None]
    if owners != [0]:
        raise _disagreement(name, f"tensor-parallel ranks {owners} hold it; the bias of a row-split layer is rank 0's")
    only = parts[0]
    assert only is not None, "rank 0 is an owner"
    return only


def _same_part(name: str, parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    other = [rank for rank, part in enumerate(parts) if not _identical(first, part)]
    if other:
        raise _disagreement(name, f"tensor-parallel ranks {other} hold other values than rank 0")
    return first


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _disagreement(name: str, why: str) -> VerificationError:
    return VerificationError(
        f"the shards of '{name}' do not fit together",
        where=f"tensor {name}",
        why=why,
        advice="quantize all ranks again in one run (with global scales if one merged file is wanted)",
    )
