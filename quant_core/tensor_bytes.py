"""See a tensor as the bytes that it takes, and know it by them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, row by row; a view of it where it lies so on the host already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of_tensor(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes."""
    return digest_of_bytes(tensor, raw_bytes(tensor))


def digest_of_bytes(tensor: Tensor, data: memoryview) -> str:
    """Return the digest of a tensor whose bytes are known."""
    digest = hashlib.sha256(str((tensor.dtype, tuple(tensor.shape))).encode())
    digest.update(data)
    return digest.hexdigest()
