"""One rank of the tensor-parallel proof: compares its divided models with whole ones and writes what it measured.

Usage of each rank: tensor_parallel_worker.py MODELS_FOLDER RESULTS_FOLDER. Rank r writes RESULTS_FOLDER/<r>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_adapters import load_adapter
from model_adapters.parallel.tensor_parallel import assert_collectives, collectives, make_local
from model_adapters.weights.loading import load_transformer
from quant_core.errors import DistributedError
from quant_core.parallel.sharding import Shard, Style
from tests.support.tiny_models import KINDS, build, example_inputs

CASES = [("flux", "mindie"), ("flux", "megatron"), ("sd3", "megatron"), ("sd35", "megatron")]
# A wrong split is wrong on any number of ranks; the smallest group shows it fastest.
MUTATED_WORLD = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def forward(kind: str, model: nn.Module, dtype: torch.dtype) -> Tensor:
    """Run one forward and return the sample."""
    with torch.inference_mode():
        return model(**example_inputs(kind, dtype))[0]


@cache
def whole_output(kind: str) -> Tensor:
    """Return what the whole model of `build` computes in float32."""
    return forward(kind, build(kind), torch.float32)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; infinite when the shapes differ."""
    if output.shape != reference.shape:
        return float("inf")
    difference = (output.double() - reference.double()).norm()
    return (difference / reference.double().norm()).item()


def same_on_all_ranks(output: Tensor) -> bool:
    """Tell whether all ranks computed the same bits."""
    outputs = [torch.empty_like(output) for _ in range(dist.get_world_size())]
    dist.all_gather(outputs, output)
    return all(torch.equal(output, other) for other in outputs)


def measure_loaded(models: Path, kind: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Load this rank's part from disk, run it, and compare with the whole model from the same files."""
    name, model_class, _ = KINDS[kind]
    rank, size = dist.get_rank(), dist.get_world_size()
    loaded = load_transformer(
        load_adapter(name),
        str(models / kind),
        tp_rank=rank,
        tp_size=size,
        tp_group=dist.group.WORLD,
        layout=layout,
        dtype=dtype,
        device="cpu",
    )
    assert_collectives(loaded.model)
    whole = model_class.from_pretrained(models / kind, subfolder="transformer", torch_dtype=dtype)
    output = forward(kind, loaded.model, dtype)
    tensors = list(loaded.model.state_dict().values())
    return {
        "error": relative_error(output, forward(kind, whole, dtype)),
        "same_on_all_ranks": same_on_all_ranks(output),
        "collectives": len(collectives(loaded.model)),
        "read_ratio": loaded.bytes_read / sum(4 * tensor.numel() for tensor in tensors),  # the files are float32
    }


def make(kind: str, layout: str) -> tuple[nn.Module, dict[str, Shard]]:
    """Build the whole model with the same seed on every rank, and divide it."""
    model = build(kind)
    plan = load_adapter(KINDS[kind][0]).shard_plan(layout)
    shards = make_local(model, plan, tp_rank=dist.get_rank(), tp_size=dist.get_world_size(), tp_group=dist.group.WORLD)
    return model, shards


def swap_slices(kind: str, layer: str) -> Callable[[nn.Module], None]:
    """Give a layer the weight slice of the next rank, as if two slices had been swapped."""

    def mutate(model: nn.Module) -> None:
        local = model.get_submodule(layer).weight
        slices = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(slices, local.data)
        local.data.copy_(slices[(dist.get_rank() + 1) % len(slices)])

    return mutate


def keep_bias(kind: str, layer: str) -> Callable[[nn.Module], None]:
    """Keep the bias of a row-split layer on every rank."""

    def mutate(model: nn.Module) -> None:
        bias = build(kind).get_submodule(layer).bias
        model.get_submodule(layer).bias = bias

    return mutate


def forget_collective(kind: str, module: str) -> Callable[[nn.Module], None]:
    """Leave out the collective of one module."""
    return lambda model: model.get_submodule(module)._forward_hooks.clear()


def keep_heads(kind: str, attention: str) -> Callable[[nn.Module], None]:
    """Count the heads of the whole model in one attention."""

    def mutate(model: nn.Module) -> None:
        model.get_submodule(attention).heads = build(kind).get_submodule(attention).heads

    return mutate


def split_packed_as_plain(kind: str, layer: str) -> Callable[[nn.Module], None]:
    """Give a packed layer neighbouring columns, as if its input were one block."""

    def mutate(model: nn.Module) -> None:
        whole = build(kind).get_submodule(layer).weight
        model.get_submodule(layer).weight.data = Shard(Style.ROW, dist.get_rank(), dist.get_world_size()).take_weight(
            whole
        )

    return mutate


_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_COMMON = [
    (swap_slices, f"{_DOUBLE}.attn.to_v"),
    (swap_slices, f"{_DOUBLE}.ff.net.2"),
    (keep_bias, f"{_DOUBLE}.attn.to_out.0"),
    (keep_bias, f"{_DOUBLE}.ff.net.2"),
    (forget_collective, f"{_DOUBLE}.attn.to_add_out"),
]
MUTATIONS = {
    ("flux", "mindie"): [
        *_COMMON,
        (swap_slices, f"{_SINGLE}.proj_out"),
        (forget_collective, f"{_SINGLE}.attn"),
        (forget_collective, f"{_SINGLE}.act_mlp"),
        (forget_collective, f"{_SINGLE}.proj_out"),
    ],
    ("flux", "megatron"): [
        *_COMMON,
        (swap_slices, f"{_SINGLE}.proj_out"),
        (split_packed_as_plain, f"{_SINGLE}.proj_out"),
        (keep_bias, f"{_SINGLE}.proj_out"),
        (forget_collective, f"{_SINGLE}.proj_out"),
    ],
    ("sd3", "megatron"): [*_COMMON, (keep_heads, f"{_DOUBLE}.attn")],
    ("sd35", "megatron"): [
        *_COMMON,
        (swap_slices, f"{_DOUBLE}.attn2.to_out.0"),
        (forget_collective, f"{_DOUBLE}.attn2.to_out.0"),
        (keep_heads, f"{_DOUBLE}.attn2"),
    ],
}


def measure_mutation(kind: str, layout: str, mutate: Callable[[nn.Module], None]) -> float:
    """Return the float32 error after a mutation; infinite when the shapes no longer fit (on every rank alike)."""
    model, _ = make(kind, layout)
    mutate(model)
    try:
        return relative_error(forward(kind, model, torch.float32), whole_output(kind))
    except RuntimeError:
        return float("inf")


class InPlaceLinear(nn.Linear):
    """A stand-in for what a quantizer makes of a layer."""


def hooks_survive_a_change_of_class(kind: str, layout: str) -> bool:
    """Change the class of every linear in place, as the quantizer does, and compare outputs again."""
    model, shards = make(kind, layout)
    for name in shards:
        model.get_submodule(name).__class__ = InPlaceLinear
    assert_collectives(model)
    return relative_error(forward(kind, model, torch.float32), whole_output(kind)) < 1e-5


def a_replaced_module_is_found(kind: str, layout: str) -> str:
    """Replace a layer by a new one and return what the check says."""
    model, _ = make(kind, layout)
    block = model.get_submodule(_DOUBLE)
    block.ff.net[2] = nn.Linear(1, 1)
    try:
        assert_collectives(model)
    except DistributedError as error:
        return error.where
    return ""


def measure(models: Path) -> dict[str, Any]:
    """Run everything this number of ranks can show."""
    results: dict[str, Any] = {}
    for kind, layout in CASES:
        case: dict[str, Any] = {name: measure_loaded(models, kind, layout, dtype) for name, dtype in DTYPES.items()}
        if dist.get_world_size() == MUTATED_WORLD:
            case["mutations"] = {
                f"{mutation.__name__} {target}": measure_mutation(kind, layout, mutation(kind, target))
                for mutation, target in MUTATIONS[kind, layout]
            }
        case["survives_class_change"] = hooks_survive_a_change_of_class(kind, layout)
        case["replaced"] = a_replaced_module_is_found(kind, layout)
        results[f"{kind} {layout}"] = case
    return results


def main() -> None:
    """Join the gloo group of all ranks, measure, and write the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = measure(Path(sys.argv[1]))
    (Path(sys.argv[2]) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
