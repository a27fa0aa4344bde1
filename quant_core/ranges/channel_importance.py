"""How much an error in each input channel of a linear layer costs in its output.

An error e in channel i adds e * w_OI[:, i] to the output. Errors of rounding are as good as independent, so their
squares add up, and a channel weighs as much as its column of the weight: h_I = sum over O of w_OI^2.

Worked example: a trained transformer has a channel with values fifty times as large as the others, read by columns of
a fiftieth. Clipping it at a tenth costs little, because h is 1/2500 there, and makes the steps of all others five times
as fine. Whoever looks at the activations alone sees the largest of all errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.parallel.groups import Parallel, reduce_over

# Whole numbers add up to the same sum in any order. 16 bits leave room: 2**37 values still add up exactly in float64.
LEVELS = 2**16 - 1


def channel_importance(layer: str, codes_OI: Tensor, weight_scale_O1: Tensor, parallel: Parallel) -> Tensor:
    """Return whole numbers from 1 to LEVELS, (I,) int64 on the host, in proportion to each channel's weight.

    Ranks that share the layer's input agree, because they must agree on its range.
    """
    energy_OI = codes_OI.to("cpu", torch.float64).mul_(weight_scale_O1.to("cpu", torch.float64)).square_()
    energy_I = energy_OI.sum(0)
    if parallel.shard(layer).split_dim == 0:
        energy_I = reduce_over(parallel.tp_group, "sum", energy_I)
    peak = reduce_over(parallel.scale_group(layer), "max", energy_I.max())
    relative_I = energy_I / peak.clamp(min=torch.finfo(torch.float64).tiny)
    return (relative_I * LEVELS).round().clamp(min=1).to(torch.int64)
