"""Give a random diffusion transformer the outlier channels that a trained one has.

Trained transformers concentrate large activations in a few channels, the same ones at every token; smoothing methods
exist because of them. Random weights have none, and every method would look equally good. So three channels are made
20, 35 and 50 times larger wherever a linear layer reads, and the columns that read them as many times smaller: the
function computed stays ordinary, only its int8 version is hard. In numbers: an input of amplitude 3 with one channel
at 3 x 50 has a per-tensor int8 step of 150 / 127 ~ 1.2, so ordinary values get about 5 levels instead of 127. A method
that moves the factor into the weights gains it all back.

Channels 5, 22 and 41 lie in three different quarters of the width 64: a row-parallel layer sees different ranges on
each rank of tp = 2 and tp = 4. What is given up: real outliers grow with depth and change more with the timestep.

A trained transformer must go on computing the same function (`add_equal_outliers`). There the gains are powers of two,
so that multiplying a row and dividing a column rounds nothing, the shift of an AdaLN layer grows with its scale, and
paths through an activation are left out, because gelu(g x) is not g gelu(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

OUTLIER_GAINS = {5: 20.0, 22: 35.0, 41: 50.0}  # channel: how many times larger than its neighbours
EQUAL_GAINS = {11: 16.0, 42: 32.0, 105: 32.0}  # the same for a width of 128, in powers of two


@dataclass(frozen=True)
class OutlierPath:
    """Name, within one block, the linears that write outlier channels and those that read them.

    `scale` says that the writer is an AdaLN linear and which of its scale chunks to raise (0 attention, 1 feed-forward,
    2 second attention); None means that the writer's own output rows grow. `after_heads`: the reader's input is the
    attention output followed by what this path writes. `activated`: a nonlinear function lies between.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    scale: int | None = None
    after_heads: bool = False
    activated: bool = False


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
OUTLIER_PATHS = (
    OutlierPath(("norm1.linear",), _QKV, scale=0),
    OutlierPath(("norm1.linear",), ("ff.net.0.proj",), scale=1),
    OutlierPath(("norm1.linear",), ("attn2.to_q", "attn2.to_k", "attn2.to_v"), scale=2),
    OutlierPath(("norm1_context.linear",), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), scale=0),
    OutlierPath(("norm1_context.linear",), ("ff_context.net.0.proj",), scale=1),
    OutlierPath(("norm.linear",), (*_QKV, "proj_mlp"), scale=0),
    # image and text tokens attend to each other's values, so both projections feed both outputs
    OutlierPath(("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out", "proj_out")),
    OutlierPath(("attn2.to_v",), ("attn2.to_out.0",)),
    OutlierPath(("ff.net.0.proj",), ("ff.net.2",), activated=True),
    OutlierPath(("ff_context.net.0.proj",), ("ff_context.net.2",), activated=True),
    OutlierPath(("proj_mlp",), ("proj_out",), after_heads=True, activated=True),
    OutlierPath(("norm_out.linear",), ("proj_out",), scale=0),
)
# How diffusers chunks the output of its AdaLN linears: number of chunks -> where the scales are.
ADALN_SCALES = {2: (0,), 3: (1,), 6: (1, 4), 9: (1, 4, 7)}
ADALN_SHIFTS = {2: (1,), 3: (0,), 6: (0, 3), 9: (0, 3, 6)}


@torch.no_grad()
def add_outliers(model: nn.Module) -> None:
    """Raise the outlier channels that linears read, and lower the reading columns by the same factor.

    Knows T5 encoders (their last norm writes the context) and the FLUX and SD3 transformers; others stay as they are.
    """
    if isinstance(model, transformers.T5EncoderModel):
        _multiply(model.encoder.final_layer_norm.weight, OUTLIER_GAINS, dim=0)
    elif isinstance(model, (diffusers.FluxTransformer2DModel, diffusers.SD3Transformer2DModel)):
        _multiply(model.context_embedder.weight, _inverse(OUTLIER_GAINS), dim=1)
        for linears in _linears_by_block(model):
            for path in OUTLIER_PATHS:
                _add_outlier_path(linears, path, OUTLIER_GAINS, raise_adaln=_raise_scale)


@torch.no_grad()
def add_equal_outliers(transformer: nn.Module) -> None:
    """Give a FLUX or SD3 transformer outlier channels, in place, without changing the function it computes.

    Only the biases of AdaLN linears round, to the precision in which they are stored.
    """
    for linears in _linears_by_block(transformer):
        for path in OUTLIER_PATHS:
            if not path.activated:
                _add_outlier_path(linears, path, EQUAL_GAINS, raise_adaln=_multiply_modulation)


def _linears_by_block(model: Any) -> Iterator[dict[str, nn.Linear]]:
    for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()), model):
        yield {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _add_outlier_path(
    linears: Mapping[str, nn.Linear],
    path: OutlierPath,
    gains: Mapping[int, float],
    raise_adaln: Callable[[nn.Linear, int, Mapping[int, float]], None],
) -> None:
    writers = [linears[name] for name in path.writers if name in linears]
    readers = [linears[name] for name in path.readers if name in linears]
    if not writers or not readers:
        return
    if path.scale is None:
        for writer in writers:
            _multiply(writer.weight, gains, dim=0)
            _multiply(writer.bias, gains, dim=0)
    elif path.scale < len(ADALN_SCALES[_chunks(writers[0])]):
        raise_adaln(writers[0], path.scale, gains)
    else:
        return  # as in SD3's last block, whose text goes nowhere
    for reader in readers:
        first_column = linears["attn.to_v"].out_features if path.after_heads else 0
        _multiply(reader.weight, _inverse(gains), dim=1, start=first_column)


def _chunks(adaln: nn.Linear) -> int:
    return adaln.out_features // adaln.in_features


def _raise_scale(adaln: nn.Linear, which: int, gains: Mapping[int, float]) -> None:
    """Add the gains to the `which`-th scale of an AdaLN linear."""
    start = ADALN_SCALES[_chunks(adaln)][which] * adaln.in_features
    for channel, gain in gains.items():
        adaln.bias[start + channel] += gain


def _multiply_modulation(adaln: nn.Linear, which: int, gains: Mapping[int, float]) -> None:
    """Multiply x (1 + scale) + shift by the gains: g (1 + scale) - 1 is the new scale, g shift the new shift."""
    scale, shift = (table[_chunks(adaln)][which] * adaln.in_features for table in (ADALN_SCALES, ADALN_SHIFTS))
    for start in (scale, shift):
        _multiply(adaln.weight, gains, dim=0, start=start)
        _multiply(adaln.bias, gains, dim=0, start=start)
    for channel, gain in gains.items():
        adaln.bias[scale + channel] += gain - 1


def _inverse(gains: Mapping[int, float]) -> dict[int, float]:
    return {channel: 1 / gain for channel, gain in gains.items()}


def _multiply(tensor: torch.Tensor, gains: Mapping[int, float], *, dim: int, start: int = 0) -> None:
    """Multiply the outlier channels of `tensor` along `dim`, counted from `start`."""
    for channel, gain in gains.items():
        tensor.select(dim, start + channel).mul_(gain)
