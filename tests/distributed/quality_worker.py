"""One rank of the proof for evaluating shards: quantizes its part, and evaluates the files that all ranks made.

Usage of each rank: quality_worker.py RESULTS_FOLDER. Rank 0 writes two cards for each case: <kind>_<layout>.json of the
ranks' own files, and swapped_<kind>_<layout>.json of the layers alone, each rank reading another's files. Each rank r
writes what it says of another's files to swapped_<kind>_<layout>_<r>.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model_adapters import load_adapter
from model_adapters.parallel.shard_plan import ShardPlan
from model_adapters.parallel.tensor_parallel import collectives, make_local
from model_adapters.quality.card import Origin
from model_adapters.quality.evaluate import evaluate_layers, published
from model_adapters.quality.measured import Measured, card_of
from quant_core import quant_model
from quant_core.calibration.records import Record, as_records
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.errors import VerificationError
from quant_core.parallel.groups import Parallel
from quant_core.quality.replayed import compare_layers
from quant_core.session.quantize import checkpoint_files
from tests.distributed.test_deployed_parallel import session
from tests.support.tiny_models import KINDS, build

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron")]
SCHEME = "w8a8_dynamic"


def measure(transformer: Any, kind: str, files: CheckpointFiles) -> Measured:
    """Evaluate a part of the float model, or all of it, against files."""
    return evaluate_layers(transformer, published(files), _records(kind), dtype=torch.float32)


def origin(kind: str) -> Origin:
    """Return where a card of these tests comes from."""
    return Origin(model=kind, quant_type=SCHEME, fingerprint="0", dtype="float32", floor_dtype="bfloat16")


def _records(kind: str) -> list[Record]:
    return as_records(session(kind, SCHEME, Path()).calib_data)


def _place() -> dict[str, Any]:
    return {"tp_rank": dist.get_rank(), "tp_size": dist.get_world_size(), "tp_group": dist.group.WORLD}


def _part(kind: str, plan: ShardPlan) -> Any:
    """Return this rank's part of the float model."""
    part = build(kind)
    make_local(part, plan, **_place())
    return part


def main() -> None:
    """Join the gloo group, evaluate every case and write its cards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size, results = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
    for kind, layout in LAYOUTS:
        plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
        part = build(kind)
        shards = make_local(part, plan, **_place())
        folders = [results / f"{kind}_{layout}_{number}" for number in range(size)]
        config = session(kind, SCHEME, folders[rank])
        quant_model(part, config, parallel=Parallel(shards=shards, tp_group=dist.group.WORLD))
        dist.barrier()
        assert config.save is not None
        files = [
            checkpoint_files(config.save.model_copy(update={"output_path": str(folder)}), SCHEME) for folder in folders
        ]
        found: list[Any] = [None] * size
        part = _part(kind, plan)
        dist.all_gather_object(found, measure(part, kind, files[rank]))
        if rank == 0:
            card_of(found, origin(kind)).write(results / f"{kind}_{layout}.json")
        try:
            measure(_part(kind, plan), kind, files[(rank + 1) % size])
        except VerificationError as error:
            (results / f"swapped_{kind}_{layout}_{rank}.txt").write_text(str(error))
        swapped = published(files[(rank + 1) % size])
        part = _part(kind, plan)
        layers = compare_layers(part, swapped.schemes, swapped.layer, _records(kind), combines=collectives(part))
        dist.all_gather_object(found, Measured(layers=layers))
        if rank == 0:
            card_of(found, origin(kind)).write(results / f"swapped_{kind}_{layout}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
