"""Suppress outliers: one factor for each group of linears that share an input, from one replay of the float model.

Activations of a diffusion transformer have a few channels that are ten to a hundred times larger than the others, in
every token. One scale for all channels then leaves the others a handful of codes. Weights have no such channels, so
dividing a large channel by s and multiplying the weight's column by s moves what is hard to quantize to where it is
easy, and changes nothing in the product: (x / s) (w s) = x w (spec: outlier suppression).

Worked example: two channels with maxima 16 and 1, weights 0.25 and 0.25. One scale for both, 16 / 127, leaves the
second channel 8 codes on each side. With s = amax^0.5 / wmax^0.5 = (8, 2) the inputs become 2 and 0.5, the weights 2
and 0.5: the second channel has 32 codes, and the weights' row maximum is now 2, of which 0.5 has 32 codes too.

What was chosen: the input is divided at run time (`mul_scale`), which every consumer can load, and fused into the
linears in front of it only on request. Factors come from the float model, so their replay comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant_core.arithmetic.numerics import Numerics
from quant_core.arithmetic.weight_codec import INT8_ROWS, Int8Rows
from quant_core.calibration.measured import Measured
from quant_core.calibration.records import Record
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.errors import InputError
from quant_core.layers.rescaling import Rescaling
from quant_core.naming import linear_at
from quant_core.parallel.groups import Group, Parallel, count_before, reduce_many, reduce_over
from quant_core.smoothing import METHODS
from quant_core.smoothing.channels import SmoothedInput, smoothed_input
from quant_core.smoothing.fusion import absorb, check_fusible
from quant_core.smoothing.groups import LinearGroup, ResolvedGroups, resolve
from quant_core.smoothing.measured_group import MeasuredGroup, SharedInput
from quant_core.smoothing.method import SmoothingConfig, SmoothingMethod
from quant_core.smoothing.statistics import InputStatistics
from quant_core.structure import ModelStructure


@dataclass(frozen=True)
class Smoothing:
    """Say how each linear changes, by name, and why which groups (by their first linear) were left out.

    inputs: what becomes of the channels of each group's input.
    """

    rescalings: Mapping[str, Rescaling] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[SmoothedInput] = ()


@torch.no_grad()
def smooth(
    model: nn.Module,
    config: SmoothingConfig,
    records: Sequence[Record],
    *,
    measured: Measured | None = None,
    structure: ModelStructure | None,
    targets: Collection[str],
    plain: Collection[str] = (),
    numerics: Numerics,
    codec: Int8Rows = INT8_ROWS,
    parallel: Parallel | None = None,
    progress: Progress = silent,
) -> Smoothing:
    """Choose the factors of a float model by replaying each record once; the model is not changed.

    measured: the channels' extremes, for a method that needs nothing else: then nothing is replayed. targets: the
    linears that will be quantized; plain: those of them that are to stay as they are; codec: how their weights will
    become codes. A group of which all members are plain is not measured. Raises ConfigurationError when
    there is nothing to smooth or to fuse into, InputError when the records do not run every group.
    """
    resolved = groups_to_smooth(model, config, structure=structure, targets=targets)
    assert structure is not None, "a model without a structure is refused"
    parallel = parallel or Parallel()
    method = METHODS[config.key]
    groups = [group for group in resolved.smoothed if not set(group.linears) <= set(plain)]
    if not groups:
        return Smoothing(skipped=resolved.skipped)
    statistics = dict(_fresh_statistics(model, groups, method, config, numerics))
    if measured is not None:
        _take_over(statistics, measured)
    else:
        _measure(model, statistics, records, count_before(parallel.dp_group, len(records)), progress)
    _combine(statistics, parallel)
    rescalings: dict[str, Rescaling] = {}
    inputs: list[SmoothedInput] = []
    for group in groups:
        of_group = _measured(model, group, statistics, structure, numerics, codec, parallel)
        # Equal to the last bit on all ranks that hold rows of the same layers, whatever order they added in.
        factor_I = reduce_over(of_group.tp_group, "max", method.factor(of_group, config))
        for name, rescaling in _rescale(model, group, factor_I, numerics, config).items():
            if name not in plain:
                rescalings[name] = rescalings.get(name, Rescaling()).then(rescaling)
        divided = tuple(name for name in group.linears if name not in plain)
        inputs.append(smoothed_input(divided, of_group.amax_I, factor_I, _other_channels(group, parallel)))
    return Smoothing(rescalings, resolved.skipped, inputs)


def groups_to_smooth(
    model: nn.Module, config: SmoothingConfig, *, structure: ModelStructure | None, targets: Collection[str]
) -> ResolvedGroups:
    """Return the groups that would be smoothed, before anything is measured; a model on the meta device is enough.

    Raises ConfigurationError when there is nothing to smooth or to fuse into.
    """
    resolved = resolve(model, structure, targets=targets, selection=config.smoothing_groups, fused=config.fused)
    if config.fused:
        check_fusible(model, resolved.smoothed, targets)
    return resolved


def _fresh_statistics(
    model: nn.Module,
    groups: Iterable[LinearGroup],
    method: SmoothingMethod,
    config: SmoothingConfig,
    numerics: Numerics,
) -> Iterator[tuple[str, InputStatistics]]:
    """Yield each input's statistics, by the first linear that reads it."""
    for name in (shared[0] for group in groups for shared in group.inputs):
        linear = linear_at(model, name)
        tokens = method.tokens(config, numerics, linear.in_features)
        yield name, InputStatistics(linear.in_features, numerics.working(linear.weight[:0]).dtype, tokens)


def _measure(
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    records: Sequence[Record],
    first: int,
    progress: Progress,
) -> None:
    """Replay the records and show each watched linear's input to its statistics.

    first: the index of the first record among those of all ranks.
    """

    def begin(index: int) -> None:
        for each in statistics.values():
            each.record = first + index

    hooks = [linear_at(model, name).register_forward_pre_hook(_observer(of)) for name, of in statistics.items()]
    try:
        replay(model, records, stage="smooth", measured=statistics, begin=begin, progress=progress)
    finally:
        for hook in hooks:
            hook.remove()


def _take_over(statistics: Mapping[str, InputStatistics], measured: Measured) -> None:
    for name, each in statistics.items():
        if (amax_I := measured.channel_maxima(name)) is not None:
            each.amax_I, each.calls = amax_I.to(each.amax_I.dtype), measured.forwards


def _observer(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda linear, inputs: statistics.update(inputs[0])


def _combine(statistics: Mapping[str, InputStatistics], parallel: Parallel) -> None:
    """Combine what data-parallel ranks saw; all come through with the same outcome."""
    calls = reduce_over(parallel.dp_group, "sum", torch.tensor([each.calls for each in statistics.values()]))
    missing = [name for name, count in zip(statistics, calls.tolist()) if count == 0]
    if missing:
        raise InputError(
            f"the calibration never ran layer '{missing[0]}'",
            where=f"calib_data ({len(missing)} smoothing groups without an input)",
            why="outlier suppression measures the input of every group by replaying what the model was called with",
            advice="calibrate with records that run the whole model, or drop the outlier suppression (--anti_method)",
        )
    reduce_many(parallel.dp_group, (part for each in statistics.values() for part in each.state()))
    for each in statistics.values():
        each.tokens.gather(parallel.dp_group)


def _measured(
    model: nn.Module,
    group: LinearGroup,
    statistics: Mapping[str, InputStatistics],
    structure: ModelStructure,
    numerics: Numerics,
    codec: Int8Rows,
    parallel: Parallel,
) -> MeasuredGroup:
    inputs = [
        SharedInput(tuple(linear_at(model, name).weight.detach() for name in shared), statistics[shared[0]])
        for shared in group.inputs
    ]
    # Row-split layers see channels of their own, so each rank chooses for itself.
    return MeasuredGroup(
        inputs,
        numerics,
        codec,
        alpha=structure.m4_exponent(is_reference=numerics.is_reference),
        floor=structure.smoothing_floor,
        tp_group=None if _other_channels(group, parallel) else parallel.tp_group,
    )


def _other_channels(group: LinearGroup, parallel: Parallel) -> Group | None:
    """Return the ranks that hold other channels of the group's input; None where each holds all."""
    row_split = any(parallel.shard(name).split_dim == 1 for name in group.linears)
    return parallel.tp_group if row_split else None


def _rescale(
    model: nn.Module, group: LinearGroup, factor_I: Tensor, numerics: Numerics, config: SmoothingConfig
) -> dict[str, Rescaling]:
    """Return how the group's linears change, and with them the linears in front when the factor is fused."""
    if config.fused:
        return {name: Rescaling(columns_I=factor_I) for name in group.linears} | absorb(model, group, factor_I)
    columns_I, mul_scale_I = numerics.split_factor(factor_I, linear_at(model, group.name).weight.dtype)
    return {name: Rescaling(columns_I=columns_I, mul_scale_I=mul_scale_I) for name in group.linears}
