"""Give a random diffusion transformer the outlier channels that a trained one has.

Trained transformers concentrate large activations in a few channels, the same ones at every token; smoothing methods
exist because of them. Random weights have none, and every method would look equally good. So three channels are made
20, 35 and 50 times larger wherever a linear layer reads, and the columns that read them as many times smaller: the
function computed stays ordinary, only its int8 version is hard. In numbers: an input of amplitude 3 with one channel
at 3 x 50 has a per-tensor int8 step of 150 / 127 ~ 1.2, so ordinary values get about 5 levels instead of 127. A method
that moves the factor into the weights gains it all back.

Channels 5, 22 and 41 lie in three different quarters of the width 64: a row-parallel layer sees different ranges on
each rank of tp = 2 and tp = 4. What is given up: real outliers grow with depth and change more with the timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import diffusers
import torch
import transformers
from torch import nn

OUTLIER_GAINS = {5: 20.0, 22: 35.0, 41: 50.0}  # channel: how many times larger than its neighbours


@dataclass(frozen=True)
class OutlierPath:
    """Name, within one block, the linears that write outlier channels and those that read them.

    `scale` says that the writer is an AdaLN linear and which of its scale chunks to raise (0 attention, 1 feed-forward,
    2 second attention); None means that the writer's own output rows grow. `after_heads`: the reader's input is the
    attention output followed by what this path writes.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    scale: int | None = None
    after_heads: bool = False


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
    OutlierPath(("ff.net.0.proj",), ("ff.net.2",)),
    OutlierPath(("ff_context.net.0.proj",), ("ff_context.net.2",)),
    OutlierPath(("proj_mlp",), ("proj_out",), after_heads=True),
    OutlierPath(("norm_out.linear",), ("proj_out",), scale=0),
)
# How diffusers chunks the output of its AdaLN linears: number of chunks -> where the scales are.
ADALN_SCALES = {2: (0,), 3: (1,), 6: (1, 4), 9: (1, 4, 7)}


@torch.no_grad()
def add_outliers(model: nn.Module) -> None:
    """Raise the outlier channels that linears read, and lower the reading columns by the same factor.

    Knows T5 encoders (their last norm writes the context) and the FLUX and SD3 transformers; others stay as they are.
    """
    if isinstance(model, transformers.T5EncoderModel):
        _multiply(model.encoder.final_layer_norm.weight, dim=0, inverse=False)
    elif isinstance(model, (diffusers.FluxTransformer2DModel, diffusers.SD3Transformer2DModel)):
        _multiply(model.context_embedder.weight, dim=1, inverse=True)
        for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()), model):
            linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            for path in OUTLIER_PATHS:
                _add_outlier_path(linears, path)


def _add_outlier_path(linears: Mapping[str, nn.Linear], path: OutlierPath) -> None:
    writers = [linears[name] for name in path.writers if name in linears]
    readers = [linears[name] for name in path.readers if name in linears]
    if not writers or not readers:
        return
    if path.scale is not None and not _raise_scale(writers[0], path.scale):
        return
    for writer in writers if path.scale is None else []:
        _multiply(writer.weight, dim=0, inverse=False)
        _multiply(writer.bias, dim=0, inverse=False)
    for reader in readers:
        first_column = linears["attn.to_v"].out_features if path.after_heads else 0
        _multiply(reader.weight, dim=1, inverse=True, start=first_column)


def _raise_scale(adaln: nn.Linear, which: int) -> bool:
    """Raise the `which`-th scale of an AdaLN linear; say False if it has no such scale (as in SD3's last block)."""
    chunks = ADALN_SCALES[adaln.out_features // adaln.in_features]
    if which >= len(chunks):
        return False
    for channel, gain in OUTLIER_GAINS.items():
        adaln.bias[chunks[which] * adaln.in_features + channel] += gain
    return True


def _multiply(tensor: torch.Tensor, *, dim: int, inverse: bool, start: int = 0) -> None:
    """Multiply (or divide) the outlier channels of `tensor` along `dim`, counted from `start`."""
    for channel, gain in OUTLIER_GAINS.items():
        tensor.select(dim, start + channel).mul_(1 / gain if inverse else gain)
