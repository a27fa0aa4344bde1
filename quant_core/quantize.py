"""Quantize a model: the whole session on one screen.

    smooth the outliers → quantize the weights → observe the activations by replaying the records → store → deploy

Smoothing comes first, because it changes what the weights and the activations are; weights come before activations,
because each layer's input is observed as it is behind the quantized layers in front of it (spec: observing). What is
left in the caller's hands computes as the hardware will.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_core.attention.head_scales import FA_QUANT, AttentionObserver
from quant_core.attention.session import attention_observers, reduce_attentions
from quant_core.attention.watch import watch_attentions
from quant_core.channel_importance import channel_importance
from quant_core.checkpoint import (
    FA_QUANT_TYPE_KEY,
    TIMESTEP_SEP_KEY,
    CheckpointFiles,
    Entry,
    description_file_name,
    entries,
    weight_file_name,
    write_checkpoint,
)
from quant_core.deployed import deploy
from quant_core.errors import ConfigurationError, InputError
from quant_core.estimators import ESTIMATORS, EstimatorKind
from quant_core.linear import QuantizedLayer, quantize_linear
from quant_core.naming import linear_names, select
from quant_core.numerics import NUMERICS, Numerics
from quant_core.observers import InputObserver, SyncRange
from quant_core.parallel import Group, Parallel, reduce_many, reduce_over
from quant_core.records import Record, as_records
from quant_core.replay import Progress, replay, silent
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Scheme
from quant_core.session_checks import check_float, first_static_step
from quant_core.session_config import SaveProcessorConfig, SessionConfig
from quant_core.smoothing.smooth import Smoothing, smooth
from quant_core.structure import ModelStructure, find_structure


@dataclass(frozen=True)
class QuantizedModel:
    """Say what a session made: the scheme's type, the layers by name, the files.

    A per-step scheme also has its number of timesteps, and `timestep_sep`: steps below it are to run dynamic.
    `skipped_groups`: which groups outlier suppression left out, by their first linear, and why.
    """

    quant_type: str
    layers: dict[str, QuantizedLayer] = field(repr=False)
    files: CheckpointFiles | None
    timesteps: int | None = None
    timestep_sep: int | None = None
    skipped_groups: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def quant_model(
    model: nn.Module,
    config: SessionConfig,
    *,
    structure: ModelStructure | None = None,
    parallel: Parallel | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """Quantize the model in place as configured, save it if the configuration says where, and leave it deployed.

    structure: found by the model's class when left out. parallel: this rank's place, when the model is a shard.
    Raises ConfigurationError for patterns that match nothing and InputError for calibration data that does not cover
    every layer and step.
    """
    parallel, numerics, scheme = parallel or Parallel(), NUMERICS[config.numerics], SCHEMES[config.scheme.quant_type]
    _check_numerics(numerics, parallel)
    check_float(model)
    _place(model, config)
    records = _ordered(as_records(config.calib_data), scheme, numerics)
    attentions = attention_observers(model, structure or find_structure(model), numerics) if config.fa3 else {}
    observes = scheme.observes_input or bool(attentions)
    if observes:
        _check_records(records, scheme, parallel.dp_group)
    steps = _timesteps(scheme, records, parallel)
    timestep_sep = first_static_step(config.scheme, len(steps))
    smoothing = _smooth(model, config, records, structure, numerics, parallel, progress)
    layers = _quantize_weights(model, config, scheme, numerics, parallel, smoothing)
    if observes:
        with watch_attentions(model, attentions):
            replay(model, records, stage="observe", progress=progress)
    _reduce_ranges(layers, scheme, steps, parallel)
    reduce_attentions(attentions, parallel.dp_group)
    for layer in layers.values():
        layer.tensors = scheme.layer_tensors(layer, steps, numerics)
    files = _save(model, config, scheme, numerics, attentions, timestep_sep)
    deploy(model, scheme.quant_type, timestep_sep=timestep_sep)
    timesteps = len(steps) if scheme.per_step else None
    return QuantizedModel(scheme.quant_type, layers, files, timesteps, timestep_sep, smoothing.skipped)


def target_layers(model: nn.Module, disable_names: Sequence[str]) -> list[str]:
    """Return the linear layers to quantize, in model order: all but the disabled ones and the last.

    The last linear makes the model's output; it stays float whatever is asked (spec: which layers).
    Raises ConfigurationError for a pattern that matches no layer.
    """
    names = linear_names(model)
    kept_float = set(select(names, disable_names, where=f"disable_names, model {type(model).__name__}"))
    kept_float.add(names[-1])
    return [name for name in names if name not in kept_float]


def _place(model: nn.Module, config: SessionConfig) -> None:
    if config.device is not None:
        index = f":{config.dev_id}" if config.dev_id is not None and config.device != "cpu" else ""
        model.to(f"{config.device}{index}")


def _ordered(records: list[Record], scheme: Scheme, numerics: Numerics) -> list[Record]:
    """Return the records in the order of the replay; only a carried range depends on it (descending step, stable)."""
    if not (scheme.per_step and numerics.carries_range):
        return records
    return sorted(records, key=lambda record: -1 if record.step is None else record.step, reverse=True)


def _smooth(
    model: nn.Module,
    config: SessionConfig,
    records: Sequence[Record],
    structure: ModelStructure | None,
    numerics: Numerics,
    parallel: Parallel,
    progress: Progress,
) -> Smoothing:
    """Return how outlier suppression changes the layers, not at all when the session has none."""
    if config.smoothing is None:
        return Smoothing()
    return smooth(
        model,
        config.smoothing,
        records,
        structure=structure or find_structure(model),
        targets=target_layers(model, config.scheme.disable_names),
        numerics=numerics,
        parallel=parallel,
        progress=progress,
    )


def _quantize_weights(
    model: nn.Module,
    config: SessionConfig,
    scheme: Scheme,
    numerics: Numerics,
    parallel: Parallel,
    smoothing: Smoothing,
) -> dict[str, QuantizedLayer]:
    # The reference tool calibrates attention behind static layers, whatever the scheme (spec: to the last bit).
    observes_input = scheme.observes_input or (config.fa3 and numerics.carries_range)
    layers = {}
    for name in target_layers(model, config.scheme.disable_names):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "target_layers returns linears"
        layers[name] = layer = quantize_linear(
            name,
            linear,
            numerics,
            scale_group=parallel.scale_group(name),
            rescaling=smoothing.rescalings.get(name),
            per_token=not scheme.observes_input,
        )
        if observes_input:
            estimator = ESTIMATORS[numerics.name][config.scheme.cfg.act_method]
            layer.observer = _input_observer(layer, estimator, scheme, numerics, parallel)
    return layers


def _input_observer(
    layer: QuantizedLayer, estimator: EstimatorKind, scheme: Scheme, numerics: Numerics, parallel: Parallel
) -> InputObserver:
    importance_I = None
    if estimator.weighs_channels:
        importance_I = channel_importance(layer.name, layer.codes_OI, layer.weight_scale_O1, parallel)
    sync = _range_sync(parallel.scale_group(layer.name))
    return InputObserver(numerics, partial(estimator.fresh, importance_I), per_step=scheme.per_step, sync=sync)


def _range_sync(group: Group | None) -> SyncRange:
    """Return what makes one call's extremes those of the whole layer: a reduction over the ranks that share scales."""

    def sync(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        neg_low, high = reduce_over(group, "max", torch.stack((-low, high))).unbind()
        return -neg_low, high

    return sync if group is not None else lambda low, high: (low, high)


def _check_numerics(numerics: Numerics, parallel: Parallel) -> None:
    if numerics.carries_range and parallel.dp_group is not None:
        raise ConfigurationError(
            "numerics='reference' cannot share records over data-parallel ranks",
            where="numerics",
            why="its running mean is defined over one sequence of records",
            advice="use one data-parallel rank (world = tp_size), or numerics='float32'",
        )


def _check_records(records: Sequence[Record], scheme: Scheme, group: Group | None) -> None:
    # A data-parallel rank without a prompt of its own is fine, and must not leave the others waiting.
    if not reduce_over(group, "sum", torch.tensor(len(records))):
        raise InputError(
            f"{scheme.quant_type} needs calibration data and got none",
            where="calib_data",
            why="static ranges and attention scales are measured by replaying what the model was called with",
            advice="dump some with DumperManager, or quantize with w8a8_dynamic and without fa3",
        )
    if scheme.per_step and (unknown := [i for i, record in enumerate(records) if record.step is None]):
        raise InputError(
            f"{len(unknown)} calibration records do not say their denoising step",
            where=f"calib_data, record {unknown[0]}",
            why=f"{scheme.quant_type} keeps a range for each step",
            advice="dump with DumperManager(model, capture_mode='timestep')",
        )


def _timesteps(scheme: Scheme, records: Sequence[Record], parallel: Parallel) -> list[int | None]:
    """Return the denoising steps that any rank has records of, from 0 on without a gap; [None] for one range."""
    if not scheme.per_step:
        return [None]
    last = max((record.step for record in records if record.step is not None), default=-1)
    return list(range(int(reduce_over(parallel.dp_group, "max", torch.tensor(last))) + 1))


def _reduce_ranges(
    layers: dict[str, QuantizedLayer], scheme: Scheme, steps: Sequence[int | None], parallel: Parallel
) -> None:
    """Combine what the ranks observed, and check that nothing is missing.

    All ranks come through with the same outcome: an absent statistic is a neutral one until all are combined.
    """
    if not scheme.observes_input:
        return
    observed = [(layer, layer.observer) for layer in layers.values() if layer.observer is not None]
    calls = torch.tensor([[observer.calls[step] for step in steps] for _, observer in observed])
    calls = reduce_over(parallel.dp_group, "sum", calls)
    if (missing := (calls == 0).nonzero()).numel():
        row, column = missing[0].tolist()
        raise _never_ran(observed[row][0].name, steps[column], len(missing))
    reduce_many(parallel.dp_group, (part for _, observer in observed for s in steps for part in observer.state(s)))
    shared = [observer for layer, observer in observed if parallel.scale_group(layer.name) is not None]
    reduce_many(parallel.tp_group, (part for observer in shared for s in steps for part in observer.state(s)))


def _never_ran(layer: str, step: int | None, count: int) -> InputError:
    return InputError(
        f"the calibration never ran layer '{layer}'" + ("" if step is None else f" in step {step}"),
        where=f"calib_data ({count} missing layer and step pairs in all)",
        why="a static range cannot be guessed",
        advice="calibrate with every step and every part of the model, or keep the layer float with disable_names",
    )


def _save(
    model: nn.Module,
    config: SessionConfig,
    scheme: Scheme,
    numerics: Numerics,
    attentions: Mapping[str, AttentionObserver],
    timestep_sep: int | None,
) -> CheckpointFiles | None:
    if config.save is None:
        return None
    extra = {name: attention.entries() for name, attention in attentions.items()}
    found: list[Entry] = list(entries(model, scheme.quant_type, buffers=numerics.writes_buffers, extra=extra))
    return write_checkpoint(
        found,
        checkpoint_files(config.save, scheme.quant_type),
        scheme.quant_type,
        header={FA_QUANT_TYPE_KEY: FA_QUANT} if attentions else {},
        metadata=({} if timestep_sep is None else {TIMESTEP_SEP_KEY: str(timestep_sep)}) | config.save.metadata,
        part_file_size=config.save.part_file_size,
    )


def checkpoint_files(save: SaveProcessorConfig, quant_type: str) -> CheckpointFiles:
    """Return where a save configuration puts the two files; names left out are the consumer's own."""
    folder = Path(save.output_path)
    return CheckpointFiles(
        folder / (save.safetensors_name or f"{weight_file_name(quant_type)}.safetensors"),
        folder / (save.json_name or f"{description_file_name(quant_type)}.json"),
    )
