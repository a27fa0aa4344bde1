"""One of four ranks, two copies of two: quantizes a tiny SD3 and evaluates its share of the pictures.

Usage: torchrun --nproc_per_node=4 ... pictures_worker.py PIPELINE PROMPTS RESULTS_FOLDER. Rank 0 writes card.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model_adapters import load_adapter
from model_adapters.quality.evaluate import evaluate, published
from model_adapters.weights.loading import LoadedTransformer, load_pipeline, load_transformer
from quant_core import SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from quant_core.parallel.groups import Parallel
from tests.support.evaluation import Subject, encoded, options_of

TP_SIZE, KIND, SCHEME = 2, "sd3", "w8a8_dynamic"


def place() -> dict[str, Any]:
    """Join the group of this rank's copy; every rank makes every group, in one order."""
    rank = dist.get_rank()
    copies = [list(range(first, first + TP_SIZE)) for first in range(0, dist.get_world_size(), TP_SIZE)]
    groups = [dist.new_group(copy) for copy in copies]
    return {"tp_rank": rank % TP_SIZE, "tp_size": TP_SIZE, "tp_group": groups[rank // TP_SIZE]}


def load(subject: Subject, where: dict[str, Any]) -> LoadedTransformer:
    """Load this rank's part of the float transformer."""
    return load_transformer(subject.adapter, subject.options.path, dtype=subject.dtype, device="cpu", **where)


def main() -> None:
    """Quantize, evaluate, and let rank 0 write the card of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    path, prompts, results = map(Path, sys.argv[1:4])
    where, copy = place(), dist.get_rank() // TP_SIZE
    adapter, options = load_adapter(KIND), options_of(KIND, path, prompts)
    batches, embeddings = encoded(adapter, options)
    # Both copies write the same files, each for itself.
    folder = results / f"copy_{copy}_shard_{where['tp_rank']}"
    subject = Subject(adapter, options, SCHEME, batches, embeddings, files=None)  # pyright: ignore[reportArgumentType]
    part = load(subject, where)
    config = SessionConfig(
        processor_cfg_map={
            SCHEME: W8A8DynamicProcessorConfig(disable_names=adapter.disabled_layers[SCHEME]),
            "save": SaveProcessorConfig(output_path=str(folder)),
        },
        calib_data=[],
    )
    parallel = Parallel(shards=part.shards, tp_group=where["tp_group"])
    files = quant_model(part.model, config, structure=adapter.structure, parallel=parallel).files
    assert files is not None

    def agree(mine: bool) -> bool:
        answer = torch.tensor(int(mine))
        dist.all_reduce(answer, dist.ReduceOp.MIN, group=where["tp_group"])
        return bool(answer)

    share = batches[copy :: dist.get_world_size() // TP_SIZE]
    painting = subject.painting(results / "quality", share, saves=where["tp_rank"] == 0, agree=agree)
    pipeline = load_pipeline(adapter, options, load(subject, where).model, "cpu", torch.float32, with_text=False)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, evaluate(painting, pipeline, published(files)))
    if dist.get_rank() == 0:
        subject.card(*found).write(results / "card.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
