"""Load one tensor-parallel rank's part of a transformer, reading nothing from disk that belongs to other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn

from model_adapters.adapter import ModelAdapter
from model_adapters.model_folder import check_class, open_weights, pipeline_folder, read_json, weight_files
from model_adapters.options import PipelineOptions
from model_adapters.tensor_parallel import make_local
from quant_core.errors import InputError
from quant_core.sharding import Shard, Style, cut

_WHOLE = Shard(Style.REPLICATED, 0, 1)


@dataclass(frozen=True)
class LoadedTransformer:
    """Hold a rank's part of a transformer and what was known on the way.

    `shards` is by linear layer (a layer that is missing is replicated), `full_shapes` by tensor name of the undivided
    model, `bytes_read` the bytes of tensors taken from the files. Strided slices of row-split weights count as what
    was asked for; the operating system reads whole pages around them.
    """

    model: nn.Module
    shards: dict[str, Shard]
    full_shapes: dict[str, tuple[int, ...]]
    bytes_read: int


def load_transformer(
    adapter: ModelAdapter,
    path: str,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    tp_group: dist.ProcessGroup | None = None,
    layout: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LoadedTransformer:
    """Load this rank's part of the transformer of a pipeline folder, frozen, in `dtype` on `device`.

    Raises ConfigurationError when the layout does not divide over `tp_size` ranks (before any weight is read) and
    InputError when the folder is not whole or holds another model.
    """
    plan = adapter.shard_plan(layout)
    folder = pipeline_folder(path) / "transformer"
    model = build_empty(adapter, folder)
    full_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = make_local(model, plan, tp_rank=tp_rank, tp_size=tp_size, tp_group=tp_group)
    files = weight_files(folder)
    _check_tensors(files, full_shapes, folder)
    bytes_read = sum(_read_file(file, model, shards, dtype, device) for file in files)
    return LoadedTransformer(model.to(device).eval().requires_grad_(False), shards, full_shapes, bytes_read)


def build_empty(adapter: ModelAdapter, folder: Path) -> nn.Module:
    """Build the transformer that `folder`/config.json describes on the meta device; its buffers are real.

    Raises InputError when the file is missing, unreadable, or describes another class or no possible model.
    """
    config_path = folder / "config.json"
    config = read_json(config_path)
    check_class(config_path, config, adapter.transformer_class)
    try:
        with init_empty_weights(include_buffers=False):
            return adapter.transformer_type().from_config(config)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ArithmeticError) as error:
        raise InputError(
            f"no {adapter.transformer_class} can be built from config.json",
            where=str(config_path),
            why=f"{type(error).__name__}: {error}",
            advice="compare the file with the one the model was published with",
        ) from error


def load_pipeline(
    adapter: ModelAdapter,
    options: PipelineOptions,
    transformer: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    cpu_offload: bool = False,
) -> Any:
    """Load the rest of the pipeline around a transformer: frozen, silent, on `device`.

    With `cpu_offload` each part is on the device only while it runs. Reads safetensors only, never a pickle, and only
    from this machine (a hub id was fetched before). Raises InputError when the folder is not whole.
    """
    folder = pipeline_folder(options.path)
    index = folder / "model_index.json"
    check_class(index, read_json(index), adapter.pipeline_class)
    try:
        pipeline = _around(adapter, folder, transformer, dtype)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"the {adapter.pipeline_class} around the transformer cannot be loaded",
            where=str(folder),
            why=str(error).strip().partition("\n")[0],
            advice="check that the folder is complete: text encoders, tokenizers, vae, scheduler",
        ) from error
    return _place(_freeze(pipeline), device, cpu_offload)


def _around(adapter: ModelAdapter, folder: Path, transformer: nn.Module, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        # The newest diffusers calls it `dtype`, the oldest one that is supported knows only this name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return adapter.pipeline_type().from_pretrained(
            folder, transformer=transformer, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )


def _freeze(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _place(pipeline: Any, device: torch.device | str, cpu_offload: bool) -> Any:
    if cpu_offload and torch.device(device).type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def _check_tensors(files: list[Path], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Compare the headers of all files with the model before a single tensor is read."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with open_weights(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if name in found and found[name] != expected[name]],
    }
    told = [f"{len(names)} {problem} ({_some(names)})" for problem, names in problems.items() if names]
    if told:
        raise InputError(
            "the weights do not fit the model that config.json describes",
            where=str(folder),
            why="tensors " + ", ".join(told),
            advice="take config.json and all weight files from one copy of the model",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_file(
    path: Path, model: nn.Module, shards: Mapping[str, Shard], dtype: torch.dtype, device: torch.device | str
) -> int:
    """Read this rank's slices of one file into the model; returns the bytes read."""
    bytes_read = 0
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118
            layer, _, tensor = name.rpartition(".")
            shard = shards.get(layer, _WHOLE)
            if tensor == "bias" and not shard.has_bias:
                continue
            source = file.get_slice(name)
            local = cut(source, shard.slices(tensor, source.get_shape()))
            bytes_read += local.numel() * local.element_size()
            wanted = dtype if local.is_floating_point() else local.dtype
            _assign(model.get_submodule(layer), tensor, local.to(device=device, dtype=wanted))
    return bytes_read


def _assign(owner: nn.Module, tensor: str, value: Tensor) -> None:
    if tensor in owner._buffers:
        owner.register_buffer(tensor, value)
    else:
        owner.register_parameter(tensor, nn.Parameter(value, requires_grad=False))
