"""The checkpoint contract: which entries a quantized model has, and the two files that hold them.

A description is a flat JSON object in module order; the safetensors file holds exactly the tensors it lists. Names,
dtypes and shapes are those of the spec (checkpoint that the runtime loads, tensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from quant_core.atomic_file import write_text_atomically
from quant_core.checkpoint.tensor_file import WrittenDigests
from quant_core.checkpoint.tensor_parts import GB, write_tensors
from quant_core.layers.calibrated import CalibratedLinear
from quant_core.schemes.quantized_layer import QuantizedLayer

FLOAT = "FLOAT"
# The type of an attention's scales, and of an attention in the description's header.
FA_QUANT = "FAQuant"
MODEL_TYPE_KEY = "model_quant_type"
FA_QUANT_TYPE_KEY = "fa_quant_type"
# In the header of the tensors: the first static step of a per-step scheme, which the description has no place for.
TIMESTEP_SEP_KEY = "timestep_sep"
# Beside it: the numerics of static layers that were written with the reference one, whose biases may overflow.
NUMERICS_KEY = "numerics"


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: its full name, its type in the description, its value."""

    name: str
    type: str
    tensor: Tensor


@dataclass(frozen=True)
class CheckpointFiles:
    """Where a checkpoint lies: its tensors and its description."""

    weights: Path
    description: Path


def weight_file_name(quant_type: str) -> str:
    """Return the stem that the consumer derives from the description's `model_quant_type`."""
    return f"quant_model_weight_{quant_type.lower()}"


def description_file_name(quant_type: str) -> str:
    """Return the stem of the description."""
    return f"quant_model_description_{quant_type.lower()}"


def entries(model: nn.Module, *, buffers: bool, extra: Mapping[str, list[Entry]]) -> Iterator[Entry]:
    """Yield every entry of a quantized model in module order.

    buffers: whether persistent buffers belong to it. extra: further entries by module name, placed where the module
    comes (attention scales).
    """
    for name, module in model.named_modules():
        if isinstance(module, CalibratedLinear):
            yield from _layer_entries(module.layer)
        else:
            yield from _float_entries(name, module, buffers)
        yield from extra.get(name, ())


def _layer_entries(layer: QuantizedLayer) -> Iterator[Entry]:
    name = layer.name
    if layer.mul_scale_I is not None:
        # A smoothed layer is a container of the factor and the linear: the runtime's own module structure.
        yield Entry(f"{name}.div.mul_scale", FLOAT, layer.mul_scale_I)
        name = f"{name}.linear"
    for tensor_name, tensor in layer.tensors.items():
        kind = FLOAT if layer.scheme.rules[tensor_name].is_float else layer.scheme.quant_type
        yield Entry(f"{name}.{tensor_name}", kind, tensor)


def _float_entries(name: str, module: nn.Module, buffers: bool) -> Iterator[Entry]:
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if buffers:
        persistent = set(dict(module.named_buffers(recurse=False))) - module._non_persistent_buffers_set
        own |= {key: value for key, value in module.named_buffers(recurse=False) if key in persistent}
    for key, tensor in own.items():
        yield Entry(f"{name}.{key}" if name else key, FLOAT, tensor)


def write_checkpoint(
    found: Iterable[Entry],
    files: CheckpointFiles,
    quant_type: str,
    *,
    header: Mapping[str, str],
    metadata: Mapping[str, str],
    part_file_size: float | None = None,
    digests: WrittenDigests | None = None,
) -> CheckpointFiles:
    """Publish the tensors, then the description, each whole or not at all; return where they are.

    header: description keys between the model's type and the entries. metadata: strings for the safetensors header.
    part_file_size: in GB; tensors that do not fit in one file of it become parts with an index. digests: takes those of
    what is written, if it is one file.
    """
    listed = list(found)
    tensors = {entry.name: entry.tensor for entry in listed}
    # Tensors may be new and a description old: then there is none for a moment.
    files.description.unlink(missing_ok=True)
    part_bytes = None if part_file_size is None else part_file_size * GB
    weights = write_tensors(files.weights, tensors, metadata=metadata, part_bytes=part_bytes, digests=digests)
    write_text_atomically(files.description, description_text(listed, quant_type, header))
    return CheckpointFiles(weights, files.description)


def description_text(found: Iterable[Entry], quant_type: str, header: Mapping[str, str] | None = None) -> str:
    """Return the description as JSON text: the model's type, the further keys of `header`, the type of each entry."""
    return json.dumps(described(found, quant_type, header or {}), indent=2) + "\n"


def described(found: Iterable[Entry], quant_type: str, header: Mapping[str, str]) -> dict[str, str]:
    """Return the description as it is read back."""
    return {MODEL_TYPE_KEY: quant_type, **header, **{entry.name: entry.type for entry in found}}
