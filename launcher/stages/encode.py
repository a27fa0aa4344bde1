"""ENCODE: turn this copy's prompts into embeddings, once, on one of its ranks, before the model is loaded.

The ranks of a tensor-parallel group need the same embeddings, and each would hold its own text encoders to compute
them. So the first rank of the group encodes for all, frees the encoders and hands the embeddings out as bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from launcher.failure.phases import run_together
from launcher.ranks.process_group import Ranks
from launcher.stages.job import Job
from model_adapters.adapter import Embeddings
from model_adapters.pipeline.prompt_encoding import Prompts, encode_prompts
from model_adapters.pipeline.prompts import Batch


def encode(job: Job) -> None:
    """Give the model the embeddings of all of this copy's batches, unless it has them; all ranks together."""
    if job.model.embeddings:
        return
    options, ranks = job.config.pipeline, job.ranks

    def mine() -> dict[Prompts, Embeddings]:
        batches = [prompts_of(batch) for batch in job.batches]
        return encode_prompts(job.model.adapter, options, batches, ranks.device, job.model.adapter.dtype(options))

    encoded = run_together(ranks, "encoding the prompts", lambda: mine() if ranks.mesh.tp_rank == 0 else {})
    job.model.embeddings = share(encoded, ranks)
    count = len(job.model.embeddings)
    job.console.say(f"encode: {count} batch{'es' * (count != 1)} of prompts")


def prompts_of(batch: Batch) -> Prompts:
    """Return the prompts of a batch, by which its embeddings are known."""
    return tuple(request.prompt for request in batch)


def share(encoded: dict[Prompts, Embeddings], ranks: Ranks) -> dict[Prompts, Embeddings]:
    """Return what the first tensor-parallel rank of this copy has encoded, on all ranks of the copy."""
    if ranks.mesh.tp_size == 1:
        return encoded
    source, group = ranks.mesh.tp_ranks[0], ranks.tp_control
    told: list[Any] = [{prompts: _described(embeddings) for prompts, embeddings in encoded.items()}]
    dist.broadcast_object_list(told, src=source, group=group)
    shared: dict[Prompts, Embeddings] = {}
    for prompts, described in told[0].items():
        own = encoded.get(prompts) or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described}
        for tensor in own.values():
            # As bytes, which every backend knows; the view writes into the tensor, which is contiguous.
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=group)
        shared[prompts] = own
    return shared


def _described(embeddings: Embeddings) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    return [(name, (tuple(tensor.shape), tensor.dtype)) for name, tensor in embeddings.items()]
