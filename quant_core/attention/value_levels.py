"""Level the channels of an attention's values before they are rotated: a massive one would drown its head's others.

Channel c is made by rows of norm v_c and read by columns of norm o_c. What it is worth, v_c o_c, stays when rows are
divided by s_c and columns multiplied by it. A rotated head has one size for all of its n channels, so errors of its
values, of the weights that make them and of those that read them all cost `sum (v / s)^2 sum (o s)^2 / n` times what
an error is of a value. That is least for s = sqrt(v / o), where rows and columns have equal norms: `(sum v o)^2 / n`,
never more than the `sum (v o)^2` of channels that have a scale each, which is what smoothing could give them.

Worked example, a head of four channels with v = (32, 1, 1, 1) and o = (1/32, 1, 1, 1), so that each is worth 1. With
a scale each they cost 4 together; rotated as they are, 1027 * 3.001 / 4 = 770; levelled first, by s = (32, 1, 1, 1), 4.

What was chosen: s follows from the weights alone, so it is there without calibration data and where weights are
streamed; and it is 2 to the power of a number of halves, a level, which the header of a checkpoint can say. Rounding
to it costs 0.2 dB of the above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel, gather_rows, reduce_over

# full name of a tensor -> this rank's part of it
Read = Callable[[str], Tensor]


def value_levels(
    model: nn.Module, linears: Mapping[str, int | None], read: Read, parallel: Parallel
) -> dict[str, tuple[int, ...]]:
    """Return for each linear around an attention the levels of the channels that it makes or reads.

    linears: by name, how many first columns are the attention's output, of this rank's heads or of all of them; None
    for those that make the values. model: may be on the meta device; read: where its tensors are. All ranks that hold
    the same channel come to the same level.
    """
    made_by = [name for name, columns in linears.items() if columns is None]
    read_by = {name: columns for name, columns in linears.items() if columns is not None}
    own = linear_at(model, made_by[0]).out_features
    # Ranks whose heads some linear of this one reads too; where none does, each rank knows enough of its own.
    others = parallel.tp_group if max(read_by.values()) > own else None
    made_C = gather_rows(others, torch.stack([_row_energies(model, name, read) for name in made_by]).sum(0))
    read_C = torch.zeros_like(made_C)
    for name, columns in read_by.items():
        energies_C = _energies(_read(model, name, "weight", read)[:, :columns], 0)
        has_own_rows = parallel.shard(name).split_dim == 0
        read_C += reduce_over(parallel.tp_group, "sum", energies_C) if has_own_rows else gather_rows(others, energies_C)
    levels_C = _levels(made_C, read_C)
    for group in (others, parallel.dp_group):
        levels_C = reduce_over(group, "max", levels_C)
    rank = parallel.shard(made_by[0]).rank if others else 0
    mine = levels_C[rank * own :][:own].tolist()
    return {name: tuple(mine if (columns or own) == own else levels_C.tolist()) for name, columns in linears.items()}


def _levels(made_C: Tensor, read_C: Tensor) -> Tensor:
    """Return 2 log2 sqrt(v / o) from both energies, rounded; nothing where one of them is 0 or not finite."""
    ratio_C = made_C / read_C
    usable_C = ratio_C.isfinite() & (ratio_C > 0)
    return (torch.where(usable_C, ratio_C, 1.0).log2() / 2).round().to(torch.int64)


def _row_energies(model: nn.Module, name: str, read: Read) -> Tensor:
    """Return the square of what a normalized input becomes in each output, (O,)."""
    energies_O = _energies(_read(model, name, "weight", read), 1)
    if linear_at(model, name).bias is None:
        return energies_O
    return energies_O + _energies(_read(model, name, "bias", read)[:, None], 1)


def _read(model: nn.Module, name: str, tensor: str, read: Read) -> Tensor:
    """Return a linear's tensor as the model rounds it, which may be narrower than where it is read."""
    return read(f"{name}.{tensor}").to(linear_at(model, name).weight.dtype)


def _energies(matrix: Tensor, dim: int) -> Tensor:
    """Return the sums of squares over rows or columns, float32 on the host."""
    return matrix.float().square().sum(dim).cpu()
