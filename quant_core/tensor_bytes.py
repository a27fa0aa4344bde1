"""See a tensor as the bytes that it takes."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, row by row; a view of it where it lies so on the host already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
