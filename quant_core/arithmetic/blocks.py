"""Work on matrices in blocks of rows that stay in a processor's cache, into buffers that are used again.

Over whole matrices every operation would go to memory and back, and every temporary be a new mapping whose pages the
system fills with zeros first. An accelerator has another kind of memory, and starting work on it costs more: there a
block is the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Numbers of a block: 2 MB of float32.
BLOCK_NUMEL = 2**19


class Rows(Protocol):
    """A matrix (O, I) whose rows can be asked for: a tensor, or one that is changed on the way."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def row_blocks(matrix: Rows) -> Iterator[slice]:
    """Yield the rows to work on at once."""
    rows, columns = matrix.shape
    step = max(1, BLOCK_NUMEL // max(1, columns)) if matrix.device.type in ("cpu", "meta") else max(1, rows)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def magnitudes(block_RI: Tensor) -> Tensor:
    """Return the absolute maximum of each row, (R, 1); NaN where a row holds one."""
    import torch

    integers = {2: torch.int16, 4: torch.int32}.get(block_RI.element_size())
    if block_RI.device.type != "cpu" or integers is None or not block_RI.is_contiguous():
        return block_RI.abs().amax(dim=1, keepdim=True)
    # Without their sign, the bits of floats are in the order of the floats, NaN last; processors are slow at NaN.
    bits = block_RI.view(integers) & torch.iinfo(integers).max
    return bits.amax(dim=1, keepdim=True).view(block_RI.dtype)


def changed_in_blocks(x: Tensor, compute: torch.dtype, change: Callable[[Tensor], object]) -> Tensor:
    """Return x (..., I) changed, in its dtype; change: of rows (R, I) in the dtype `compute`, in place."""
    import torch

    x_NI = x.reshape(-1, x.shape[-1])
    changed_NI, buffer = torch.empty_like(x_NI), None
    for rows in row_blocks(x_NI):
        block = x_NI[rows]
        buffer = torch.empty(block.shape, dtype=compute, device=x.device) if buffer is None else buffer
        change(work := buffer[: len(block)].copy_(block))
        changed_NI[rows] = work
    return changed_NI.view(x.shape)
