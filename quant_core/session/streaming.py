"""Quantize a model that is never held: one layer at a time from where its weights lie to the file.

A scheme whose result depends on no activation (dynamic, without smoothing and without attention scales) needs no
forward, so it needs no model either: a description on the meta device says which layers there are and what shapes
they have, and each weight is read, quantized and written before the next one is read. Row by row even: a weight has
one scale per output row, and a block of rows needs nothing of the others.

Worked example: the widest layer of FLUX.1-dev is (18432, 3072), 108 MiB in bfloat16. Quantized at once, float32
arithmetic would hold four copies of 216 MiB; in blocks of 2^22 numbers it holds four of 16 MiB, and the rank's peak
is the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.calibration.finite import check_weight
from quant_core.calibration.replay import Progress, silent
from quant_core.checkpoint.entries import description_text, entries
from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.errors import ConfigurationError
from quant_core.layers.calibrated import CalibratedLinear
from quant_core.naming import linear_at
from quant_core.parallel.groups import Group, Parallel, reduce_over
from quant_core.schemes import SCHEMES
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Derivation, Scheme
from quant_core.session.config import SessionConfig
from quant_core.session.quantize import QuantizedModel, checkpoint_files
from quant_core.session.targets import layer_plan

# full name of a tensor -> this rank's part of it, on the host
ReadTensor = Callable[[str], Tensor]


def reads_activations(model: nn.Module, config: SessionConfig) -> bool:
    """Tell whether a session needs calibration data: static ranges, smoothing and attention scales do.

    model: the one to quantize, or a description of it on the meta device.
    """
    observes = any(SCHEMES[scheme.key].observes_input for scheme in layer_plan(model, config).values())
    return observes or config.smoothing is not None or config.fa3 is not None


@torch.no_grad()
def quantize_streaming(
    model: nn.Module,
    read: ReadTensor,
    config: SessionConfig,
    *,
    parallel: Parallel | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> QuantizedModel:
    """Quantize and save a model that lies on disk, with the memory of its largest layer; nothing is replayed.

    model: on the meta device, with this rank's local shapes in the dtype to compute in; it is changed. read: returns
    a tensor by its full name. device: where to compute. The tensors and the description are those of `quant_model`.
    The layers of the result are on the meta device. Without a place to save, nothing is read.
    """
    if reads_activations(model, config):
        raise AssertionError("a session that reads activations needs the model: quant_model")
    if config.save is not None and config.save.part_file_size is not None:
        raise ConfigurationError(
            "a streamed checkpoint cannot be written in parts",
            where="SaveProcessorConfig.part_file_size",
            why="every tensor goes straight to its place in one file",
            advice="drop part_file_size, or quantize with quant_model",
        )
    parallel, numerics, quant_type = (
        parallel or Parallel(),
        NUMERICS[config.numerics],
        SCHEMES[config.scheme.key].quant_type,
    )
    plan = {name: SCHEMES[scheme.key] for name, scheme in layer_plan(model, config).items()}
    layers = describe_layers(model, plan, numerics)
    if config.save is None:
        return QuantizedModel(quant_type, layers, None)
    described = list(entries(model, buffers=not numerics.is_reference, extra={}))
    kept_float = {entry.name: entry.tensor.dtype for entry in described if _owner(entry.name) not in layers}
    stream = _LayerStream(read, numerics, torch.device(device))

    def write(path: Path) -> None:
        with TensorFile(path, {entry.name: entry.tensor for entry in described}, metadata) as file:
            for name, dtype in kept_float.items():
                file.write(name, read(name).to(dtype))
            for done, layer in enumerate(layers.values(), start=1):
                stream.quantize(layer, parallel.scale_group(layer.name), file)
                progress("quantize", done, len(layers))

    files, metadata = checkpoint_files(config.save, quant_type), config.save.metadata
    write_atomically(files.weights, write)
    write_text_atomically(files.description, description_text(described, quant_type))
    return QuantizedModel(quant_type, layers, files)


def describe_layers(model: nn.Module, plan: Mapping[str, Scheme], numerics: Numerics) -> dict[str, QuantizedLayer]:
    """Make each layer of the plan on the meta device look as if it had been quantized; return them by name."""
    layers = {}
    for name, scheme in plan.items():
        linear = linear_at(model, name)
        codes_OI = torch.empty_like(linear.weight, dtype=torch.int8)
        layer = QuantizedLayer(name, scheme, codes_OI, linear.weight.new_empty(len(codes_OI), 1), linear.bias)
        layer.tensors = scheme.layer_tensors(layer, Derivation([None], numerics))
        linear.__class__ = CalibratedLinear
        linear.layer = layers[name] = layer  # type: ignore[assignment]
    return layers


@dataclass(frozen=True)
class _LayerStream:
    """Carry one layer at a time from where it lies into the file."""

    read: ReadTensor
    numerics: Numerics
    device: torch.device

    def quantize(self, described: QuantizedLayer, group: Group | None, file: TensorFile) -> None:
        """Read, quantize and write the layer, a block of rows at a time; group: ranks that share its row maxima."""
        name, dtype, codec = described.name, described.weight_scale_O1.dtype, described.scheme.codec
        # The stored weight is rounded to the dtype to compute in first, as a loaded model's is.
        w_OI = self.read(f"{name}.weight").to(self.device, dtype)
        bias_O = None if described.bias_O is None else self.read(f"{name}.bias").to(dtype)
        amax_O1 = codec.row_maxima(w_OI)
        check_weight(name, amax_O1)
        weight = codec.encode(w_OI, reduce_over(group, "max", amax_O1), dtype, self.numerics)
        layer = QuantizedLayer(name, described.scheme, weight.codes, weight.scale, bias_O)
        given = Derivation([None], self.numerics, group)
        for tensor_name, tensor in described.scheme.layer_tensors(layer, given).items():
            file.write(f"{name}.{tensor_name}", tensor)


def _owner(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
