"""Turn prompts into what the transformer reads, before the transformer is there.

Text encoders are large (T5 of FLUX.1-dev: 9.5 GB) and needed once. So they are loaded first, alone, encode every
prompt, and go; the pipeline then runs without them, on the embeddings. Prompts are encoded in the batches in which
they will be used, so the embeddings are those that the pipeline itself would have computed, to the last bit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch

from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.weights.loading import load_text_encoders

# The prompts of one batch.
Prompts = tuple[str, ...]


@torch.no_grad()
def encode_prompts(
    adapter: ModelAdapter,
    options: PipelineOptions,
    batches: Iterable[Prompts],
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[Prompts, Embeddings]:
    """Return the embeddings of each different batch of prompts, on the host; the text encoders come and go.

    What batches of one size have in common, such as the negative prompt, they share.

    Raises InputError when the pipeline folder is not whole.
    """
    pipeline = load_text_encoders(adapter, options, device, dtype)
    encoded: dict[Prompts, Embeddings] = {}
    first: dict[int, Embeddings] = {}
    for batch in dict.fromkeys(batches):
        own = _on_host(adapter.encode(pipeline, list(batch), options))
        encoded[batch] = _sharing(own, first.setdefault(len(batch), own))
    del pipeline
    release_memory(device)
    return encoded


def release_memory(device: torch.device | str) -> None:
    """Give memory that nobody uses any more back to the device."""
    gc.collect()
    if (kind := torch.device(device).type) != "cpu":
        getattr(torch, kind).empty_cache()


def _on_host(embeddings: Embeddings) -> Embeddings:
    return {name: tensor.cpu().contiguous() for name, tensor in embeddings.items()}


def _sharing(embeddings: Embeddings, other: Embeddings) -> Embeddings:
    """Return the embeddings with those tensors of the other ones that are equal."""
    return {name: other[name] if torch.equal(other[name], own) else own for name, own in embeddings.items()}
