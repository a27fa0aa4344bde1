"""Attention scales of two ranks are those of one: each has its own heads, or its own records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import make_local
from quant_core import FA3ProcessorConfig, SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from quant_core.parallel.groups import Parallel
from tests.support.tiny_models import KINDS, build, louder_records

pytestmark = pytest.mark.distributed

RANKS = 2
# Sums over two ranks are in another order, a few units of 2^-24 over some ten layers.
FLOAT_TOLERANCE = 1e-5
# Each rank rounds its own part of a row-split layer's input with its own token scales, which moves what later
# attentions see. Measured: the median head's scale by up to 6.4e-3, one head's by up to 6.3e-2 (where the shortest
# window drops another outlier).
MEDIAN_TOLERANCE, HEAD_TOLERANCE = 2e-2, 0.2

TENSOR_PARALLEL = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
# With every linear in front of attention float, a rank's heads see the very numbers that they see in the whole model.
SCHEMES = {"float": {"norm_out.linear": "w8a8_dynamic", "*": "float"}, "quantized": {}}


def scales(
    model: Any, kind: str, folder: Path, calib_data: Sequence[Any], schemes: dict[str, str], parallel: Parallel
) -> Any:
    """Run an FA3 session and return what it wrote for the attentions."""
    config = SessionConfig(
        processor_cfg_map={
            "w8a8_dynamic": W8A8DynamicProcessorConfig(),
            "fa3": FA3ProcessorConfig(),
            "save": SaveProcessorConfig(output_path=str(folder)),
        },
        layer_schemes=schemes,  # type: ignore[arg-type]
        calib_data=calib_data,
    )
    quant_model(model, config, structure=load_adapter(KINDS[kind][0]).structure, parallel=parallel)
    written = load_file(folder / "quant_model_weight_w8a8_dynamic.safetensors")
    return {name: tensor for name, tensor in written.items() if ".fa_" in name}


def tensor_parallel_scales(kind: str, layout: str, folder: Path, schemes: dict[str, str]) -> Any:
    """Return the scales of this rank's heads."""
    model, group = build(kind), dist.group.WORLD
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    shards = make_local(model, plan, tp_rank=dist.get_rank(), tp_size=dist.get_world_size(), tp_group=group)
    parallel = Parallel(shards=shards, tp_group=group)
    return scales(model, kind, folder, louder_records(kind, 2), schemes, parallel)


def data_parallel_scales(kind: str, folder: Path, mine: Sequence[Any]) -> Any:
    """Return the scales that all ranks agreed on, each having replayed its own records."""
    return scales(build(kind), kind, folder, mine, {}, Parallel(dp_group=dist.group.WORLD))


def on_each_rank(results: Path) -> None:
    """Run every case and write its scales, `<case>_<rank>.safetensors`."""
    rank = dist.get_rank()
    session = results / f"session_{rank}"
    for kind, layout in TENSOR_PARALLEL:
        for name, schemes in SCHEMES.items():
            found = tensor_parallel_scales(kind, layout, session, schemes)
            save_file(found, results / f"{kind}_{layout}_{name}_{rank}.safetensors")
    split = data_parallel_scales("flux", session, louder_records("flux", 3)[rank::2])
    save_file(split, results / f"split_{rank}.safetensors")
    idle = data_parallel_scales("flux", session, louder_records("flux", 3) if rank else [])
    save_file(idle, results / f"idle_{rank}.safetensors")


each_layout = pytest.mark.parametrize(("kind", "layout"), TENSOR_PARALLEL)


def joined(results: Path, case: str) -> dict[str, Tensor]:
    """Put the heads of all ranks side by side."""
    parts = [load_file(results / f"{case}_{rank}.safetensors") for rank in range(RANKS)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@each_layout
def test_scales_of_the_ranks_heads_are_those_of_the_whole_model(results, kind, layout, tmp_path):
    whole = scales(build(kind), kind, tmp_path, louder_records(kind, 2), SCHEMES["float"], Parallel())
    torch.testing.assert_close(joined(results, f"{kind}_{layout}_float"), whole, rtol=FLOAT_TOLERANCE, atol=0)


@each_layout
def test_quantized_linears_move_scales_only_behind_the_first_row_split_layer(results, kind, layout, tmp_path):
    whole = scales(build(kind), kind, tmp_path, louder_records(kind, 2), SCHEMES["quantized"], Parallel())
    ranks = joined(results, f"{kind}_{layout}_quantized")
    assert ranks.keys() == whole.keys()
    for name in filter(lambda name: name.endswith(".scale"), whole):
        error = (ranks[name] / whole[name] - 1).abs()
        if name.startswith("transformer_blocks.0."):
            assert error.max() == 0, name
        assert error.median() < MEDIAN_TOLERANCE, name
        assert error.max() < HEAD_TOLERANCE, name


def test_heads_differ_so_that_a_swap_of_ranks_would_show(results):
    first, second = (load_file(results / f"flux_mindie_float_{rank}.safetensors") for rank in range(RANKS))
    names = [name for name in first if name.endswith(".scale")]
    assert all((first[name] / second[name] - 1).abs().max() > 1e-2 for name in names)


@pytest.mark.parametrize("case", ["split", "idle"])
def test_scales_over_shared_out_records_are_those_of_one_rank_with_all(results, case, tmp_path):
    whole = scales(build("flux"), "flux", tmp_path, louder_records("flux", 3), {}, Parallel())
    for rank in range(RANKS):
        shared = load_file(results / f"{case}_{rank}.safetensors")
        assert shared.keys() == whole.keys()
        assert all(torch.equal(shared[name], tensor) for name, tensor in whole.items())
