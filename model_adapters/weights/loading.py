"""Load one tensor-parallel rank's part of a transformer, reading nothing from disk that belongs to other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from model_adapters.adapter import ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.weights.brought import NOTHING, Brought
from model_adapters.weights.lora import fuse_module, read_changes
from model_adapters.weights.model_folder import (
    PARTS_NAME,
    check_class,
    pipeline_folder,
    read_json,
    read_parts,
    variant_of_pipeline,
)
from model_adapters.weights.transformer_folders import used_folders
from model_adapters.weights.transformer_part import TransformerPart, build_empty, describe_transformer, place
from quant_core.errors import InputError
from quant_core.parallel.sharding import Shard

# How the names of those parts of a pipeline begin that only encode prompts, and of those that only decode latents.
_TEXT, _DECODERS = ("text_encoder", "tokenizer"), ("vae",)


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
    brought: Brought = NOTHING,
) -> LoadedTransformer:
    """Load this rank's part of the transformer of a pipeline folder, frozen, in `dtype` on `device`.

    Raises ConfigurationError when the layout does not divide over `tp_size` ranks (before any weight is read) and
    InputError when the folder is not whole or holds another model.
    """
    part = describe_transformer(
        adapter,
        path,
        tp_rank=tp_rank,
        tp_size=tp_size,
        tp_group=tp_group,
        layout=layout,
        dtype=dtype,
        brought=brought,
    )
    return load_part(part, device)


def load_part(part: TransformerPart, device: torch.device | str) -> LoadedTransformer:
    """Read everything that a description names, in the order of the files; the described model becomes the real one."""
    bytes_read = 0
    described = part.model.state_dict()
    for name in sorted(described, key=lambda name: (part.stored[name].path, part.stored[name].start)):
        local = part.read(name)
        bytes_read += local.numel() * part.stored[name].dtype.itemsize
        place(part.model, name, local.to(device, described[name].dtype))
    model = part.model.to(device).eval().requires_grad_(False)
    return LoadedTransformer(model, part.shards, part.full_shapes, bytes_read)


def load_pipeline(
    adapter: ModelAdapter,
    options: PipelineOptions,
    transformer: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    cpu_offload: bool = False,
) -> Any:
    """Load the rest of the pipeline around a transformer: frozen, silent, on `device`, without text encoders.

    It runs on embeddings. With `cpu_offload` each part is on the device only while it runs.
    Reads safetensors only, never a pickle, and only from this machine (a hub id was fetched before). Raises InputError
    when the folder is not whole.
    """
    pipeline = _assemble(adapter, options, dtype, {**_without(_TEXT, options), "transformer": transformer})
    return _place(pipeline, device, cpu_offload)


def release_pipeline(pipeline: Any) -> None:
    """Take off what CPU offload hung on the parts, so that the transformer can run without the pipeline."""
    pipeline.remove_all_hooks()


def load_text_encoders(
    adapter: ModelAdapter, options: PipelineOptions, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """Load a pipeline of text encoders on `device` and nothing else that takes memory; it can encode prompts only.

    Raises InputError when the folder is not whole.
    """
    # Some encoders ask for the transformer's widths, which a model without weights knows too.
    folder, loras = pipeline_folder(options.path, options.variant), Brought.of(options).loras
    empty = build_empty(adapter, used_folders(folder)[0])
    pipeline = _assemble(adapter, options, dtype, {**_without(_DECODERS, options), "transformer": empty})
    for name, part in pipeline.components.items():
        if name.startswith(_TEXT) and isinstance(part, nn.Module):
            shapes = {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
            fuse_module(part, read_changes(adapter.pipeline_type(), loras, name, shapes))
            part.to(device)
    return pipeline


def _without(parts: tuple[str, ...], options: PipelineOptions) -> dict[str, None]:
    """Return None for every part of the pipeline whose name begins so, which loads the pipeline without it."""
    folder = pipeline_folder(options.path, options.variant)
    return dict.fromkeys(name for name in read_parts(folder) if name.startswith(parts))


def _assemble(
    adapter: ModelAdapter, options: PipelineOptions, dtype: torch.dtype, given: Mapping[str, nn.Module | None]
) -> Any:
    """Load all parts of a pipeline but those that are given (or None, to go without), on the host, frozen."""
    folder = pipeline_folder(options.path, options.variant)
    check_class(folder / PARTS_NAME, read_json(folder / PARTS_NAME), adapter.pipeline_class)
    missing = {name: None for name, kind in read_parts(folder).items() if not any(kind)}
    try:
        return _freeze(_from_folder(adapter, folder, options.variant, dtype, {**missing, **given}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the {adapter.pipeline_class} around the transformer cannot be loaded",
            where=str(folder),
            why=str(error).strip().partition("\n")[0],
            advice="check that the folder is complete: text encoders, tokenizers, vae, scheduler",
        ) from error


def _from_folder(
    adapter: ModelAdapter,
    folder: Path,
    variant: str | None,
    dtype: torch.dtype,
    given: Mapping[str, nn.Module | None],
) -> Any:
    if variant is None:
        variant = variant_of_pipeline(folder, [name for name in read_parts(folder) if name not in given])
    with warnings.catch_warnings():
        # The newest diffusers calls it `dtype`, the oldest one that is supported knows only this name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return adapter.pipeline_type().from_pretrained(
            folder,
            **given,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
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
