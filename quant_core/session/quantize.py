"""Quantize a model: the whole session on one screen.

    rotate values → smooth outliers → quantize weights → observe activations by replaying the records → store → deploy

Rotation and smoothing come first, because they change what the weights and the activations are; weights come before
activations, because each layer's input is observed as it is behind the quantized layers in front of it (spec:
observing). What is left in the caller's hands computes as the hardware will.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from quant_core.attention.rotated_values import rotate_values
from quant_core.attention.session import reduce_attentions
from quant_core.attention.watch import watch_attentions
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.checkpoint.content import ContentCheck
from quant_core.checkpoint.entries import (
    FA_QUANT,
    FA_QUANT_TYPE_KEY,
    NUMERICS_KEY,
    TIMESTEP_SEP_KEY,
    CheckpointFiles,
    description_file_name,
    entries,
    weight_file_name,
    write_checkpoint,
)
from quant_core.checkpoint.rotations import said_of_rotations
from quant_core.checkpoint.tensor_file import WrittenDigests
from quant_core.layers.calibrated import encode_linear, quantize_linear
from quant_core.layers.deployed import deploy
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel
from quant_core.schemes import SCHEMES
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Derivation
from quant_core.session.checks import (
    check_float,
    check_forwards,
    check_numerics,
    check_outputs,
    check_records,
    first_static_step,
)
from quant_core.session.config import SaveProcessorConfig, SessionConfig
from quant_core.session.observation import input_observer, reduce_ranges
from quant_core.session.session import Session
from quant_core.smoothing.channels import SmoothedInput
from quant_core.smoothing.smooth import Smoothing, smooth
from quant_core.structure import ModelStructure, find_structure


@dataclass(frozen=True)
class QuantizedModel:
    """Say what a session made: the type that the checkpoint is called after, the layers by name, the files.

    With layers of a per-step scheme it also has the number of timesteps, and `timestep_sep`: steps below it are to run
    dynamic.
    `skipped_groups`: which groups outlier suppression left out, by their first linear, and why; `unrotated`: the same
    of attentions whose values were to be rotated. `smoothed_inputs`: the channels of the inputs that it divided.
    """

    quant_type: str
    layers: dict[str, QuantizedLayer] = field(repr=False)
    files: CheckpointFiles | None
    timesteps: int | None = None
    timestep_sep: int | None = None
    skipped_groups: Mapping[str, str] = field(default_factory=dict)
    unrotated: Mapping[str, str] = field(default_factory=dict)
    smoothed_inputs: Sequence[SmoothedInput] = ()


@torch.no_grad()
def quant_model(
    model: nn.Module,
    config: SessionConfig,
    *,
    structure: ModelStructure | None = None,
    parallel: Parallel | None = None,
    progress: Progress = silent,
    digests: WrittenDigests | None = None,
    checked: bool = False,
) -> QuantizedModel:
    """Quantize the model in place as configured, save it if the configuration says where, and leave it deployed.

    structure: found by the model's class when left out. parallel: this rank's place, when the model is a shard.
    digests: takes those of the file of weights. checked: hold what is saved against the consumer's rules before it is
    written, and raise VerificationError where it breaks one.
    Raises ConfigurationError for patterns that match nothing and InputError for calibration data that does not cover
    every layer and step.
    """
    session = Session(model, config, structure or find_structure(model), parallel or Parallel(), progress)
    check_float(model)
    check_forwards(model, session.targets)
    check_outputs(model, {name: session.scheme_of(name) for name in session.targets})
    check_numerics(session)
    check_records(session)
    timestep_sep = first_static_step(session)
    _move_to_device(model, config)
    untie(model, session.targets)
    rotate_values(model, session.rotations.linears)
    smoothing = smoothing_of(session)
    layers = _quantize_weights(session, smoothing)
    _observe(session, layers)
    _derive_tensors(session, layers)
    files = _save(session, timestep_sep, digests, checked=checked)
    deploy(model, timestep_sep=timestep_sep)
    return QuantizedModel(
        session.quant_type,
        layers,
        files,
        timesteps=len(session.steps) if session.per_step else None,
        timestep_sep=timestep_sep,
        skipped_groups=smoothing.skipped,
        unrotated=session.rotations.skipped,
        smoothed_inputs=smoothing.inputs,
    )


def _move_to_device(model: nn.Module, config: SessionConfig) -> None:
    if config.device is not None:
        index = f":{config.dev_id}" if config.dev_id is not None and config.device != "cpu" else ""
        model.to(f"{config.device}{index}")


def untie(model: nn.Module, targets: Iterable[str]) -> None:
    """Give each layer that changes a weight and a bias of its own: what shares its tensors stays as it is."""
    owners = Counter(tensor.data_ptr() for _, tensor in model.named_parameters(remove_duplicate=False))
    for name in targets:
        linear = linear_at(model, name)
        for key, tensor in linear.named_parameters(recurse=False):
            if owners[tensor.data_ptr()] > 1:
                setattr(linear, key, nn.Parameter(tensor.detach().clone(), requires_grad=False))


def smoothing_of(session: Session) -> Smoothing:
    """Return how outlier suppression changes the layers, not at all when the session has none.

    A layer whose runtime does not multiply its input, or that is to be left alone, is not divided by anything.
    """
    config = session.config.smoothing
    if config is None:
        return Smoothing()
    kept_plain = [
        n for n in session.targets if not (session.scheme_of(n).multiplies_input and session.plan[n].smoothed)
    ]
    return smooth(
        session.model,
        config,
        session.records,
        measured=session.measured,
        structure=session.structure,
        targets=session.targets,
        plain=() if config.fused else kept_plain,
        numerics=session.numerics,
        codec=SCHEMES[session.config.scheme.key].codec,
        parallel=session.parallel,
        progress=session.progress,
    )


def _quantize_weights(session: Session, smoothing: Smoothing) -> dict[str, QuantizedLayer]:
    layers = {}
    for done, name in enumerate(session.targets, start=1):
        linear = linear_at(session.model, name)
        layers[name] = layer = encode_linear(
            name,
            linear,
            session.scheme_of(name),
            session.numerics,
            scale_group=session.parallel.scale_group(name),
            rescaling=smoothing.rescalings.get(name),
            fake_OI=linear.weight.detach() if session.replays else None,
        )
        quantize_linear(linear, layer, runs=session.replays)
        layer.observer = input_observer(session, layer)
        session.progress("weights", done, len(session.targets))
    return layers


def _observe(session: Session, layers: Mapping[str, QuantizedLayer]) -> None:
    """Replay the records, if anything depends on activations, and let the ranks agree on what they saw."""
    if session.replays:
        with watch_attentions(session.model, session.attentions):
            replay(
                session.model,
                session.records,
                stage="observe",
                measured=session.targets,
                progress=session.progress,
            )
    reduce_ranges(session, layers)
    reduce_attentions(session.attentions, session.parallel.dp_group)


def _derive_tensors(session: Session, layers: Mapping[str, QuantizedLayer]) -> None:
    for done, layer in enumerate(layers.values(), start=1):
        steps = session.steps_of(layer.scheme)
        given = Derivation(steps, session.numerics, session.parallel.scale_group(layer.name))
        layer.tensors = layer.scheme.layer_tensors(layer, given)
        layer.observer = None  # all that it knew is in the tensors; an estimator may know megabytes
        session.progress("derive", done, len(layers))


def _save(
    session: Session, timestep_sep: int | None, digests: WrittenDigests | None, *, checked: bool
) -> CheckpointFiles | None:
    save, quant_type = session.config.save, session.quant_type
    if save is None:
        return None
    extra = {name: attention.entries() for name, attention in session.attentions.items()}
    # Whoever reads a bias that overflows has to know that it was meant to.
    overflows = session.numerics.is_reference and any(scheme.observes_input for scheme in session.schemes)
    said = {NUMERICS_KEY: session.numerics.name} if overflows else {}
    said |= {} if timestep_sep is None else {TIMESTEP_SEP_KEY: str(timestep_sep)}
    said |= said_of_rotations(session.rotations.linears)
    header, metadata = {FA_QUANT_TYPE_KEY: FA_QUANT} if session.attentions else {}, said | save.metadata
    found = list(entries(session.model, buffers=not session.numerics.is_reference, extra=extra))
    files = checkpoint_files(save, quant_type)
    if checked:
        check = ContentCheck(found, files, quant_type, header, metadata)
        check.everything({entry.name: entry.tensor for entry in found})
    return write_checkpoint(
        found,
        files,
        quant_type,
        header=header,
        metadata=metadata,
        part_file_size=save.part_file_size,
        digests=digests,
    )


def checkpoint_files(save: SaveProcessorConfig, quant_type: str) -> CheckpointFiles:
    """Return where a save configuration puts the two files; names left out are the consumer's own."""
    folder = Path(save.output_path)
    return CheckpointFiles(
        folder / (save.safetensors_name or f"{weight_file_name(quant_type)}.safetensors"),
        folder / (save.json_name or f"{description_file_name(quant_type)}.json"),
    )
