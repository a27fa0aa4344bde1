"""One rank of the smoothing proof: chooses factors of its part, applies them in float, and writes both.

Usage: torchrun ... smoothing_worker.py RESULTS_FOLDER. Rank r writes `<case>_<r>.safetensors` (the factor of each
linear, and the rows that absorb one) and `errors_<r>.json` (how far each float output is from the whole model's).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core import M3ProcessorConfig, M4ProcessorConfig, M6Config, M6ProcessorConfig
from quant_core.parallel.groups import Parallel
from quant_core.smoothing.method import SmoothingConfig
from quant_core.smoothing.smooth import Smoothing
from tests.support.smoothed_models import apply_in_float, outlier_model, outputs, records, relative_error, smoothed
from tests.support.tiny_models import KINDS

LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
METHODS: dict[str, dict[str, Any]] = {
    "m3": {"kind": M3ProcessorConfig},
    "m4": {"kind": M4ProcessorConfig},
    "m6": {"kind": M6ProcessorConfig, "cfg": M6Config(alpha=0.8, beta=0.2)},
    "m6_searched": {"kind": M6ProcessorConfig},
}
RECORDS = 4
# Above the limit of a sample of tokens, and shared out unevenly: where each of two ranks begins.
MANY_RECORDS, FIRST_RECORDS = 130, (0, 90, 130)


def config_of(method: str, fused: bool) -> SmoothingConfig:
    """Return the configuration of a method over all groups."""
    options = dict(METHODS[method])
    return options.pop("kind")(smoothing_groups="all", fused=fused, **options)


def disabled(kind: str) -> tuple[str, ...]:
    """Return what stays float: SD3's text input, as in its recipe, because nothing can absorb its factor."""
    return () if kind == "flux" else ("context_embedder",)


def factors(smoothing: Smoothing) -> dict[str, Tensor]:
    """Return what each linear's columns and rows are multiplied with."""
    columns = {f"{name}.columns": change.columns_I for name, change in smoothing.rescalings.items()}
    rows = {f"{name}.rows": change.rows_O for name, change in smoothing.rescalings.items()}
    return {name: factor.clone() for name, factor in (columns | rows).items() if factor is not None}


def local_part(kind: str, layout: str, *, agree: bool = True) -> tuple[Any, Parallel]:
    """Build the whole model with the same seed on every rank, and divide it; `agree`: with the others' statistics."""
    model, rank, size = outlier_model(kind), dist.get_rank(), dist.get_world_size()
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    shards = make_local(model, plan, tp_rank=rank, tp_size=size, tp_group=dist.group.WORLD)
    return model, Parallel(shards=shards, tp_group=dist.group.WORLD if agree else None)


def main() -> None:
    """Join the gloo group of all ranks, smooth every case, and write the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank, errors = Path(sys.argv[1]), dist.get_rank(), {}
    for kind, layout in LAYOUTS:
        of = records(kind, RECORDS)
        exact = outputs(outlier_model(kind), of)
        for method in METHODS:
            for form in ("run_time", "fused"):
                case = f"{kind}_{layout}_{method}_{form}"
                model, parallel = local_part(kind, layout)
                smoothing = smoothed(kind, model, config_of(method, form == "fused"), of, disabled(kind), parallel)
                save_file(factors(smoothing), folder / f"{case}_{rank}.safetensors")
                apply_in_float(model, smoothing)
                errors[case] = relative_error(outputs(model, of), exact)
    for method in METHODS:
        mine = records("flux", MANY_RECORDS)[FIRST_RECORDS[rank] : FIRST_RECORDS[rank + 1]]
        shared = Parallel(dp_group=dist.group.WORLD)
        smoothing = smoothed("flux", outlier_model("flux"), config_of(method, False), mine, (), shared)
        save_file(factors(smoothing), folder / f"flux_data_{method}_{rank}.safetensors")
    model, alone = local_part("flux", "mindie", agree=False)
    smoothing = smoothed("flux", model, config_of("m4", False), records("flux", RECORDS), (), alone)
    save_file(factors(smoothing), folder / f"flux_alone_{rank}.safetensors")
    (folder / f"errors_{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
