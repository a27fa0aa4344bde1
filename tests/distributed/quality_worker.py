"""One rank of the proof for evaluating shards: quantizes its part, and evaluates the files that all ranks made.

Usage: torchrun ... quality_worker.py RESULTS_FOLDER. Rank 0 writes a card for each case: <kind>_<layout>.json of the
ranks' own files, and swapped_<kind>_<layout>.json of the same with each rank reading another's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from model_adapters.quality.card import Origin
from model_adapters.quality.evaluate import evaluate_layers, published
from model_adapters.quality.measured import Measured, card_of
from quant_core import quant_model
from quant_core.calibration.records import as_records
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.parallel.groups import Parallel
from quant_core.session.quantize import checkpoint_files
from tests.distributed.deployed_worker import session
from tests.support.tiny_models import KINDS, build

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron")]
SCHEME = "w8a8_dynamic"


def measure(transformer: Any, kind: str, files: CheckpointFiles, folder: Path) -> Measured:
    """Evaluate a part of the float model, or all of it, against files."""
    records = as_records(session(kind, SCHEME, folder).calib_data)
    return evaluate_layers(transformer, published(files), records, dtype=torch.float32)


def origin(kind: str) -> Origin:
    """Return where a card of these tests comes from."""
    return Origin(model=kind, quant_type=SCHEME, fingerprint="0", dtype="float32", floor_dtype="bfloat16")


def main() -> None:
    """Join the gloo group, evaluate every case and write its cards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size, results = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
    place = {"tp_rank": rank, "tp_size": size, "tp_group": dist.group.WORLD}
    for kind, layout in LAYOUTS:
        plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
        part = build(kind)
        shards = make_local(part, plan, **place)
        folders = [results / f"{kind}_{layout}_{number}" for number in range(size)]
        config = session(kind, SCHEME, folders[rank])
        quant_model(part, config, parallel=Parallel(shards=shards, tp_group=dist.group.WORLD))
        dist.barrier()
        for prefix, read in (("", rank), ("swapped_", (rank + 1) % size)):
            assert config.save is not None
            saved = config.save.model_copy(update={"output_path": str(folders[read])})
            part = build(kind)
            make_local(part, plan, **place)
            found: list[Any] = [None] * size
            measured = measure(part, kind, checkpoint_files(saved, SCHEME), results)
            dist.all_gather_object(found, measured)
            if rank == 0:
                card_of(found, origin(kind)).write(results / f"{prefix}{kind}_{layout}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
