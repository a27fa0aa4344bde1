"""What quantization does to the products of a group's inputs and weights, for many candidate factors at once.

Each block of a weight's rows is read once for all candidates and stays in the cache; of the exact product and of each
candidate's, nothing is kept but sums of squares.

A search wants the squared size of an error E (N tokens by O outputs), not E. For a k x N matrix R of random signs over
sqrt(k), the size of R E is that of E on the average over R, and every token has its share in it, also the one token
that is larger than all others. All that is computed here is linear in the tokens once they are quantized, so R goes to
the tokens first, and the products are those of k rows instead of N. R is the same for all candidates, so what it adds
to one it adds to all, and their order hardly depends on it.

Rows of a weight are alike in the same way: the sum over a few hundred of them, evenly spaced, stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_core.arithmetic.blocks import row_blocks
from quant_core.arithmetic.weight_codec import Int8Rows

# So many mixtures stand for all tokens.
SKETCH_ROWS = 128
# At least so many of a weight's rows stand for all of them, where it has three times as many.
SAMPLED_OUTPUTS = 384


class ProductErrors(NamedTuple):
    """Sums of squares over the outputs of one weight: of each candidate's error (C,), and of the exact product ().

    Over all outputs, foretold from those that were computed where a weight has many.
    """

    errors: Tensor
    exact: Tensor


def product_errors(
    x_NI: Tensor,
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    codec: Int8Rows,
    quantized: Callable[[Tensor], Tensor] = lambda x_NI: x_NI,
) -> list[ProductErrors]:
    """Return for each weight (O, I) the errors of `quantized(x / factor) @ round_trip(w * factor).T`, by factor (I,).

    x_NI, factors: float32. quantized: what becomes of the divided input; nothing when left out.
    """
    x_KI = sketch(x_NI)
    inputs = [sketch(quantized(x_NI / factor_I)) for factor_I in factors]
    return [_errors_of(w_OI, x_KI, inputs, factors, codec) for w_OI in weights]


def _errors_of(
    w_OI: Tensor, x_KI: Tensor, inputs: Sequence[Tensor], factors: Sequence[Tensor], codec: Int8Rows
) -> ProductErrors:
    errors, exact = torch.zeros(len(inputs), device=x_KI.device), torch.zeros((), device=x_KI.device)
    sampled_RI = w_OI[:: _stride(len(w_OI))]
    for rows in row_blocks(sampled_RI):
        block = sampled_RI[rows].to(torch.float32)
        wanted = F.linear(x_KI, block)
        exact += wanted.square().sum()
        for index, (candidate, factor_I) in enumerate(zip(inputs, factors)):
            found = F.linear(candidate, codec.round_trip(block * factor_I))
            errors[index] += found.sub_(wanted).square_().sum()
    share = len(sampled_RI) / len(w_OI)
    return ProductErrors(errors / share, exact / share)


def _stride(outputs: int) -> int:
    """Return every which row is looked at; an odd number, because heads are powers of two wide."""
    return max(1, (outputs // SAMPLED_OUTPUTS - 1) | 1)


def sketch(x_NI: Tensor) -> Tensor:
    """Return a few mixtures of the tokens, which stand for all of them; the tokens themselves when they are few."""
    tokens = len(x_NI)
    if tokens <= SKETCH_ROWS:
        return x_NI
    return _signs(tokens).to(x_NI) @ x_NI / SKETCH_ROWS**0.5


@lru_cache(maxsize=4)
def _signs(tokens: int) -> Tensor:
    return torch.randint(2, (SKETCH_ROWS, tokens), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
