"""Two ranks that compute in integers, each its part, are as close to the float model as one rank is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import assert_collectives, make_local
from quant_core import SaveProcessorConfig, SessionConfig, TimestepManager, quant_model
from quant_core.checkpoint.loading import load_deployed
from quant_core.parallel.groups import Parallel
from quant_core.schemes import SCHEMES
from tests.support.tiny_models import KINDS, build, example_inputs

pytestmark = pytest.mark.distributed

RANKS = 2
LAYOUTS = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron")]
STEPS = 2  # the first runs dynamic, the second static


def session(kind: str, scheme: str, folder: Path) -> SessionConfig:
    """Ask for a scheme on one record a step."""
    base = example_inputs(kind)
    records = [
        {"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + step)}, "timestep_idx": step}
        for step in range(STEPS)
    ]
    processors = {scheme: SCHEMES[scheme].config(), "save": SaveProcessorConfig(output_path=str(folder))}
    return SessionConfig(processor_cfg_map=processors, calib_data=records)


@torch.no_grad()
def output(model: Any, kind: str, step: int) -> Tensor:
    """Return the model's output on the example in a denoising step."""
    TimestepManager.set_timestep_idx(step)
    found = model(**example_inputs(kind))[0]
    TimestepManager.set_timestep_idx(None)
    return found


def outputs(kind: str, layout: str, scheme: str, folder: Path) -> dict[str, Tensor]:
    """Quantize this rank's part, and return what it and its files compute in each step."""
    plan, group = load_adapter(KINDS[kind][0]).shard_plan(layout), dist.group.WORLD
    models = {name: build(kind) for name in ("quantized", "loaded")}
    place = {"tp_rank": dist.get_rank(), "tp_size": dist.get_world_size(), "tp_group": group}
    shards = {name: make_local(model, plan, **place) for name, model in models.items()}["quantized"]
    result = quant_model(
        models["quantized"], session(kind, scheme, folder), parallel=Parallel(shards=shards, tp_group=group)
    )
    assert result.files is not None
    load_deployed(models["loaded"], result.files)
    for model in models.values():
        assert_collectives(model)
    return {f"{name}_{step}": output(model, kind, step) for name, model in models.items() for step in range(STEPS)}


def on_each_rank(results: Path) -> None:
    """Run every case and write its outputs, `<kind>_<layout>_<scheme>_<rank>.safetensors`."""
    rank = dist.get_rank()
    for kind, layout in LAYOUTS:
        for scheme in SCHEMES:
            found = outputs(kind, layout, scheme, results / f"session_{rank}")
            save_file(found, results / f"{kind}_{layout}_{scheme}_{rank}.safetensors")


each_case = pytest.mark.parametrize(
    ("kind", "layout", "scheme"), [(kind, layout, scheme) for kind, layout in LAYOUTS for scheme in SCHEMES]
)


def of_ranks(results: Path, kind: str, layout: str, scheme: str) -> list[dict[str, Tensor]]:
    return [load_file(results / f"{kind}_{layout}_{scheme}_{rank}.safetensors") for rank in range(RANKS)]


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """Signal over quantization noise in dB."""
    wanted, found = wanted.double(), found.double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@each_case
def test_the_files_of_each_rank_compute_what_its_quantized_part_computed(results, kind, layout, scheme):
    for found in of_ranks(results, kind, layout, scheme):
        for step in range(STEPS):
            assert torch.equal(found[f"loaded_{step}"], found[f"quantized_{step}"])


@each_case
def test_all_ranks_compute_one_output(results, kind, layout, scheme):
    first, second = of_ranks(results, kind, layout, scheme)
    for name in first:
        assert torch.equal(first[name], second[name])


@each_case
def test_a_divided_model_is_as_close_to_the_float_one_as_a_whole_one(results, kind, layout, scheme, tmp_path):
    float_model, whole = build(kind), build(kind)
    quant_model(whole, session(kind, scheme, tmp_path))
    found = of_ranks(results, kind, layout, scheme)[0]
    for step in range(STEPS):
        wanted = output(float_model, kind, step)
        divided, undivided = sqnr(wanted, found[f"quantized_{step}"]), sqnr(wanted, output(whole, kind, step))
        # Measured: 27 to 32 dB, divided 0.8 better to 0.6 worse. A bias counted on every rank, or a partial sum with
        # another rank's scale, would leave next to nothing.
        assert undivided > 25
        assert divided > undivided - 1.5
