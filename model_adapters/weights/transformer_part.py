"""Describe one tensor-parallel rank's part of a transformer without holding it, and read it tensor by tensor.

The description is a model on the meta device that has the rank's local shapes, heads and collectives. What may be
read from it later, all at once or a layer at a time, is named and has its final shape and dtype, and nothing has been
read from disk but headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_adapters.adapter import ModelAdapter
from model_adapters.parallel.tensor_parallel import make_local
from model_adapters.weights.brought import NOTHING, Brought
from model_adapters.weights.lora import Changes, fuse, read_changes
from model_adapters.weights.model_folder import CONFIG_NAME, check_class, pipeline_folder, read_json
from model_adapters.weights.single_file import converted_tensors
from model_adapters.weights.stored_tensor import PLAIN, Reading, Stored, stored_tensors
from model_adapters.weights.transformer_folders import WHOLE, files_of, folder_of_rank, used_folders
from quant_core.errors import InputError, few
from quant_core.parallel.sharding import Shard, Style

_WHOLE = Shard(Style.REPLICATED, 0, 1)


@dataclass(frozen=True)
class TransformerPart:
    """Know a rank's part of a transformer: its shapes, and where its tensors lie.

    `model` is on the meta device, with local shapes, in `dtype`, which is computed in; `shards` is by linear layer (a
    layer that is missing is replicated); `full_shapes` and `stored` are by tensor name of the undivided model;
    `is_divided`: the files hold this rank's slices already; `changes` are added to the weights of layers when these are
    read.
    """

    model: nn.Module
    shards: dict[str, Shard]
    full_shapes: dict[str, tuple[int, ...]]
    stored: Mapping[str, Stored]
    dtype: torch.dtype
    is_divided: bool = False
    changes: Changes = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """How large the files are that tensors are read from."""
        return sum(path.stat().st_size for path in {stored.path for stored in self.stored.values()})

    def read(self, name: str, rows: slice | None = None, how: Reading = PLAIN) -> Tensor:
        """Read this rank's slice of one tensor, or some rows of it: contiguous, on the host.

        In the dtype of the file; a weight that is changed in the one to compute in.
        """
        layer, _, tensor = name.rpartition(".")
        shard = _WHOLE if self.is_divided else self.shards.get(layer, _WHOLE)
        stored = self.stored[name]
        local = stored.read(shard.slices(tensor, stored.shape), rows, how)
        if tensor != "weight" or layer not in self.changes:
            return local
        terms = self.changes[layer]
        return fuse(local, terms if rows is None else [term.of_rows(rows) for term in terms], self.dtype)


def describe_transformer(
    adapter: ModelAdapter,
    path: str,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    tp_group: dist.ProcessGroup | None = None,
    layout: str | None = None,
    dtype: torch.dtype,
    brought: Brought = NOTHING,
    with_files: bool = True,
    empty: nn.Module | None = None,
) -> TransformerPart:
    """Describe this rank's part of the transformer of a pipeline folder, or of a file that is brought in its place.

    with_files: find the weights too, and what is added to them, and compare their headers; without, the configuration
    is enough and nothing can be read. empty: the undivided model, where somebody built it already; it is used up.

    Raises ConfigurationError when the layout does not divide over `tp_size` ranks and InputError when the folder is
    not whole or holds another model, or a brought file does not fit it.
    """
    plan, root, single = adapter.shard_plan(layout), pipeline_folder(path, brought.variant), brought.transformer
    folder, is_divided = (used_folders(root)[0], False) if single else folder_of_rank(root, plan, tp_rank, tp_size)
    model = empty or build_empty(adapter, folder)
    full_shapes = _shapes(model)
    shards = make_local(model, plan, tp_rank=tp_rank, tp_size=tp_size, tp_group=tp_group)
    expected = _shapes(model) if is_divided else full_shapes
    stored: Mapping[str, Stored] = {}
    if with_files:
        paths = [] if single else files_of(folder, is_divided=is_divided, variant=brought.variant)
        stored = {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}
        if single:
            stored = converted_tensors(single, adapter.transformer_class, expected)
        _check_tensors(stored, expected, single or folder)
    loras = brought.loras if with_files else ()
    changes = read_changes(adapter.pipeline_type(), loras, WHOLE, full_shapes) if loras else {}
    local = {layer: [term.of_shard(shards.get(layer)) for term in terms] for layer, terms in changes.items()}
    for name, tensor in model.state_dict().items():
        place(model, name, tensor.to("meta", dtype if tensor.is_floating_point() else tensor.dtype))
    return TransformerPart(model, shards, full_shapes, stored, dtype, is_divided, local)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build_empty(adapter: ModelAdapter, folder: Path) -> nn.Module:
    """Build the transformer that `folder`/config.json describes on the meta device; buffers that no file has are real.

    Raises InputError when the file is missing, unreadable, or describes another class or no possible model.
    """
    config_path = folder / CONFIG_NAME
    config = read_json(config_path)
    check_class(config_path, config, adapter.transformer_class)
    transformer_type = adapter.transformer_type()  # outside: a failing import of diffusers is not the folder's fault
    try:
        with torch.device("meta"):
            model = transformer_type.from_config(config)
        if any(module._non_persistent_buffers_set for module in model.modules()):
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                model = transformer_type.from_config(config)
        return model
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ArithmeticError) as error:
        raise InputError(
            f"no {adapter.transformer_class} can be built from config.json",
            where=str(config_path),
            why=f"{type(error).__name__}: {error}",
            advice="compare the file with the one the model was published with",
        ) from error


def place(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the model's parameter or buffer of that full name, whatever it was before."""
    module, _, tensor = name.rpartition(".")
    owner = model.get_submodule(module)
    if tensor in owner._buffers:
        owner.register_buffer(tensor, value)
    else:
        owner.register_parameter(tensor, nn.Parameter(value, requires_grad=False))


def _check_tensors(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compare the tensors that the headers of all files name with those of the model."""
    found = {name: tensor.shape for name, tensor in stored.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if name in found and found[name] != expected[name]],
    }
    told = [f"{len(names)} {problem} ({few(names, between=', ')})" for problem, names in problems.items() if names]
    if told:
        raise InputError(
            "the weights do not fit the model that config.json describes",
            where=str(where),
            why="tensors " + ", ".join(told),
            advice="take config.json and all weight files from one copy of the model",
        )
