"""Quantize a model that is never held: one layer at a time from where its weights lie to the file.

A scheme whose result depends on no activation (dynamic, without smoothing and without attention scales) needs no
forward, so it needs no model either: a description on the meta device says which layers there are and what shapes
they have, and each weight is read, quantized, digested and written while the next one is being read: one thread
reads, one computes, one writes.

Worked example: the widest layer of FLUX.1-dev is (18432, 3072), 108 MiB in bfloat16 and 54 MiB in codes. It comes in
seven pieces, of which six are there at once (one computed, five read ahead): 96 MiB. Three such layers are there in
codes (one computed, one waiting, one being written): 258 MiB in all, whatever the depth of the model. This memory is
used again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.arithmetic.rotation import Rotation
from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.attention.rotated_values import Rotations, find_rotations, levelled
from quant_core.calibration.finite import check_part
from quant_core.calibration.replay import Progress, silent
from quant_core.checkpoint.content import ContentCheck
from quant_core.checkpoint.entries import description_text, entries
from quant_core.checkpoint.rotations import said_of_rotations
from quant_core.checkpoint.tensor_file import TensorFile, WrittenDigests
from quant_core.checkpoint.tensor_parts import CODES
from quant_core.errors import ConfigurationError
from quant_core.layers.calibrated import CalibratedLinear
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel, reduce_over
from quant_core.reused_memory import ReusedMemory
from quant_core.schemes import SCHEMES
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Derivation, Scheme
from quant_core.session.checks import check_forwards, check_outputs
from quant_core.session.config import SessionConfig
from quant_core.session.quantize import QuantizedModel, checkpoint_files
from quant_core.session.read_ahead import Piece, ReadTensor, read_ahead, row_pieces
from quant_core.session.targets import layer_plan
from quant_core.structure import ModelStructure, find_structure


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
    structure: ModelStructure | None = None,
    parallel: Parallel | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    digests: WrittenDigests | None = None,
    checked: bool = False,
) -> QuantizedModel:
    """Quantize and save a model that lies on disk, with the memory of its largest layer; nothing is replayed.

    model: on the meta device, with this rank's local shapes in the dtype to compute in; it is changed. read: returns
    a tensor by its full name, in a thread of its own. device: where to compute. digests: takes those of the file of
    weights. checked: hold each tensor against the consumer's rules before it is written, as `quant_model` does.
    The tensors and the description are those of `quant_model`. The layers of the result are on the meta device.
    Without a place to save, nothing is read.
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
    parallel, numerics = parallel or Parallel(), NUMERICS[config.numerics]
    quant_type = SCHEMES[config.scheme.key].quant_type
    plan = {name: SCHEMES[scheme.key] for name, scheme in layer_plan(model, config).items()}
    check_forwards(model, plan)
    check_outputs(model, plan)
    rotations = Rotations()
    if config.rotate_values:
        rotations = find_rotations(model, structure or find_structure(model), targets=plan, parallel=parallel)
    if config.save is not None:
        # Copies of the model that save nothing do not come here, so there is nobody to agree with.
        rotations = levelled(model, rotations, read, parallel=replace(parallel, dp_group=None), progress=progress)
    layers = describe_layers(model, plan, numerics)
    if config.save is None:
        return QuantizedModel(quant_type, layers, None, unrotated=rotations.skipped)
    described = list(entries(model, buffers=not numerics.is_reference, extra={}))
    tensors, files = {entry.name: entry.tensor for entry in described}, checkpoint_files(config.save, quant_type)
    metadata = said_of_rotations(rotations.linears) | config.save.metadata
    check = ContentCheck(described, files, quant_type, {}, metadata) if checked else None
    quantize = _LayerStep(numerics, torch.device(device), parallel, rotations.linears)

    def write(path: Path) -> None:
        with _one_thread_each(), TensorFile(path, tensors, metadata, in_front=CODES, digests=digests) as file:
            _carry(layers, read, quantize, file, tensors, check, progress)

    files.description.unlink(missing_ok=True)
    write_atomically(files.weights, write)
    write_text_atomically(files.description, description_text(described, quant_type))
    return QuantizedModel(quant_type, layers, files, unrotated=rotations.skipped)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let the threads that read, compute and write work alone.

    One computes faster than a disk reads. The teams that torch would give them wait for work in loops: three teams of
    as many threads as there are cores keep each other from it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _carry(
    layers: Mapping[str, QuantizedLayer],
    read: ReadTensor,
    quantize: _LayerStep,
    file: TensorFile,
    described: Mapping[str, Tensor],
    check: ContentCheck | None,
    progress: Progress,
) -> None:
    """Carry everything from where it lies into the file, in its order: codes, then what is small or stays float."""
    # What a layer has besides its codes waits until its place comes: some kilobytes a layer.
    small: dict[str, Tensor] = {}
    codes = {f"{name}.weight": layer for name, layer in layers.items()}
    ordered = [codes[name] for name in file.names if name in codes]
    rest = [name for name in file.names if name not in codes]
    kept_float = [Piece(name, described[name].nbytes) for name in rest if _owner(name) not in layers]
    with read_ahead(read, [*(piece for layer in ordered for piece in quantize.pieces(layer)), *kept_float]) as ahead:
        for done, layer in enumerate(ordered, start=1):
            made = quantize(layer, ahead)
            if check:
                check.quantized_layer(layer.name, made)
            small |= made
            file.write(f"{layer.name}.weight", small.pop(f"{layer.name}.weight"))
            progress("quantize", done, len(ordered))
        quantize.memory.release()
        for name in rest:
            if name in small:
                file.write(name, small.pop(name))
                continue
            kept = next(ahead).to(described[name].dtype)
            if check:
                check.kept_float(name, kept)
            file.write(name, kept)


@dataclass(frozen=True)
class _LayerStep:
    """Turn one layer's float tensors into what the checkpoint holds of it."""

    numerics: Numerics
    device: torch.device
    parallel: Parallel
    rotations: Mapping[str, Rotation]
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    def pieces(self, layer: QuantizedLayer) -> list[Piece]:
        """Return what is read of a layer, in order: its bias, then its weight in as many pieces as can be worked on."""
        bias = [] if layer.bias_O is None else [Piece(f"{layer.name}.bias", layer.bias_O.nbytes)]
        return [*bias, *self._weight_pieces(layer)]

    def __call__(self, described: QuantizedLayer, read: Iterator[Tensor]) -> dict[str, Tensor]:
        """Return the layer's tensors by full name; read: gives its pieces."""
        name, dtype, codec = described.name, described.weight_scale_O1.dtype, described.scheme.codec
        rotation, group = self.rotations.get(name), self.parallel.scale_group(name)
        bias_O = None if described.bias_O is None else next(read).to(dtype)
        if bias_O is not None:
            check_part(name, "bias", bias_O)
            bias_O = bias_O if rotation is None else rotation.bias(bias_O)
        codes_OI, scales = self.memory.empty(described.codes_OI.shape, torch.int8), []
        for piece in self._weight_pieces(described):
            # The stored weight is rounded to the dtype to compute in first, as a loaded model's is.
            w_OI = next(read).to(self.device, dtype)
            w_OI = w_OI if rotation is None else rotation.weight(w_OI)
            amax_O1 = codec.row_maxima(w_OI)
            check_part(name, "weight", amax_O1)
            codes = codes_OI if piece.rows is None else codes_OI[piece.rows]
            amax_O1 = reduce_over(group, "max", amax_O1)
            scales.append(codec.encode(w_OI, amax_O1, dtype, self.numerics, codes_OI=codes).scale)
        layer = QuantizedLayer(name, described.scheme, codes_OI, torch.cat(scales), bias_O)
        tensors = described.scheme.layer_tensors(layer, Derivation([None], self.numerics, group))
        return {f"{name}.{tensor_name}": tensor.cpu() for tensor_name, tensor in tensors.items()}

    def _weight_pieces(self, layer: QuantizedLayer) -> list[Piece]:
        """Return the pieces of a weight; one, where rows mix, all ranks agree on each, or a device takes it whole."""
        name, (rows, columns) = f"{layer.name}.weight", layer.codes_OI.shape
        row_bytes = columns * layer.weight_scale_O1.itemsize
        is_whole = self.device.type != "cpu" or layer.name in self.rotations
        if is_whole or self.parallel.scale_group(layer.name) is not None:
            return [Piece(name, rows * row_bytes)]
        return row_pieces(name, rows, row_bytes)


def _owner(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
