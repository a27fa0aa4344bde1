"""Multiply matrices of 8-bit codes exactly, on devices that have an integer matrix product and on those that have none.

A float32 product of codes is exact as long as no partial sum leaves the 24 bits of its significand: each product is at
most 128 * 127 = 16256, so 1024 of them reach 16 646 144, just below 2**24 = 16 777 216, in whatever order a library
adds them. So the input axis is cut into chunks of 1024, each is multiplied in float32, and the chunks are added as
integers. The reduced-precision modes of float32 products do no harm: they shorten the factors to eight bits or more,
and a code has no more, while the sum stays in float32.

PyTorch's product of int8 matrices on the host is four times as fast as float32, and wrong in two cases, both silent.
Processors without VNNI add pairs of products in 16 bits and saturate: the first use tries the extreme codes, and the
answer decides for the process. And it reads the strides of dimensions of size 1, which mean nothing, so that an input
of one feature or an expanded one leaves the result unwritten: only matrices laid out row by row go there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# The longest chunk whose sum of products of codes cannot leave the integers that float32 holds exactly.
_CHUNK = 1024
_EXTREME = -128
# Elsewhere `_int_mm` demands sizes that depend on the device.
_INTEGER_DEVICES = frozenset({"cpu"})


def integer_product(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """Return x_NI @ w_OI.T exactly, (N, O) int32; both int8, w without -128, I at most 132 000 (2**31 / 127 / 128)."""
    fast = _is_row_by_row(x_NI) and _is_row_by_row(w_OI) and _has_exact_int8_product(x_NI.device.type)
    return _int8_product(x_NI, w_OI) if fast else _chunked_product(x_NI, w_OI)


def _is_row_by_row(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return rows > 0 and columns > 1 and matrix.stride() == (columns, 1)


def _int8_product(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    return torch._int_mm(x_NI, w_OI.T)


def _chunked_product(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    total = torch.zeros(x_NI.shape[0], w_OI.shape[0], dtype=torch.int32, device=x_NI.device)
    for x, w in zip(x_NI.split(_CHUNK, dim=1), w_OI.split(_CHUNK, dim=1)):
        total += (x.to(torch.float32) @ w.to(torch.float32).T).to(torch.int32)
    return total


@lru_cache
def _has_exact_int8_product(device_type: str) -> bool:
    """Try the codes that overflow first, in the shapes that libraries treat apart: one token, and many."""
    if device_type not in _INTEGER_DEVICES:
        return False
    w_OI = torch.full((32, 256), -_EXTREME - 1, dtype=torch.int8)
    w_OI[1::2] *= -1
    for tokens in (1, 32):
        x_NI = torch.full((tokens, 256), _EXTREME, dtype=torch.int8)
        x_NI[:, ::2] = 127
        try:
            found = _int8_product(x_NI, w_OI)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(found, _chunked_product(x_NI, w_OI)):
            return False
    return True
