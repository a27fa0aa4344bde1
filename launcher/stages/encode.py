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
    """Return what the first tensor-parallel rank of this copy has encoded, on all ranks of the copy.

    A tensor that batches share is handed out once.
    """
    if ranks.mesh.tp_size == 1:
        return encoded
    source, group = ranks.mesh.tp_ranks[0], ranks.tp_control
    tensors = list({id(tensor): tensor for each in encoded.values() for tensor in each.values()}.values())
    number = {id(tensor): place for place, tensor in enumerate(tensors)}
    names = {prompts: {name: number[id(t)] for name, t in each.items()} for prompts, each in encoded.items()}
    told: list[Any] = [names, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
    dist.broadcast_object_list(told, src=source, group=group)
    names, described = told
    own = tensors or [torch.empty(shape, dtype=dtype) for shape, dtype in described]
    for tensor in own:
        # As bytes, which every backend knows; the view writes into the tensor, which is contiguous.
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=group)
    return {prompts: {name: own[place] for name, place in each.items()} for prompts, each in names.items()}
