"""Observe the inputs of static layers: which observer a layer gets, and what the ranks agree on afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from quant_core.calibration.measured import Measured
from quant_core.calibration.observers import InputObserver
from quant_core.errors import InputError
from quant_core.parallel.groups import reduce_many, reduce_over
from quant_core.ranges.channel_importance import channel_importance
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.session.session import Session


def input_observer(session: Session, layer: QuantizedLayer) -> InputObserver | None:
    """Return what watches the layer's input during the replay, or has seen it; None when nothing needs to."""
    # The reference tool calibrates attention behind static layers, whatever the scheme (spec: to the last bit).
    if not (layer.scheme.observes_input or (session.attentions and session.numerics.is_reference)):
        return None
    if session.measured:
        return _observed(session, layer, session.measured)
    estimator = session.estimator_of(layer.name)
    importance_I = None
    if estimator.weighs_channels:
        importance_I = channel_importance(layer.name, layer.codes_OI, layer.weight_scale_O1, session.parallel)
    fresh, group = partial(estimator.fresh, importance_I), session.parallel.scale_group(layer.name)
    return InputObserver(session.numerics, fresh, per_step=layer.scheme.per_step, scale_group=group)


def _observed(session: Session, layer: QuantizedLayer, measured: Measured) -> InputObserver:
    """Return an observer that has seen what was measured of the layer, behind its factor if it has one."""
    fresh = partial(session.estimator_of(layer.name).fresh, None)
    observer = InputObserver(session.numerics, fresh, per_step=layer.scheme.per_step)
    observer.restore(measured.behind(layer.name, layer.mul_scale_I))
    return observer


def reduce_ranges(session: Session, layers: Mapping[str, QuantizedLayer]) -> None:
    """Combine what the ranks observed, and check that nothing is missing.

    All ranks come through with the same outcome: an absent statistic is a neutral one until all are combined.
    """
    parallel = session.parallel
    observed = [
        (layer.name, layer.observer, step)
        for layer in layers.values()
        if layer.observer is not None and layer.scheme.observes_input
        for step in session.steps_of(layer.scheme)
    ]
    calls = torch.tensor([observer.calls[step] for _, observer, step in observed])
    calls = reduce_over(parallel.dp_group, "sum", calls)
    if (missing := (calls == 0).nonzero()).numel():
        name, _, step = observed[int(missing[0])]
        raise never_ran(name, step, len(missing))
    reduce_many(parallel.dp_group, (part for _, observer, step in observed for part in observer.state(step)))
    shared = [(observer, step) for name, observer, step in observed if parallel.scale_group(name) is not None]
    reduce_many(parallel.tp_group, (part for observer, step in shared for part in observer.state(step)))


def never_ran(layer: str, step: int | None, count: int) -> InputError:
    """Return the error that says that records ran a layer in none of the calls that a range would come from."""
    return InputError(
        f"the calibration never ran layer '{layer}'" + ("" if step is None else f" in step {step}"),
        where=f"calib_data ({count} missing layer and step pairs in all)",
        why="a static range cannot be guessed",
        advice="calibrate with every step and every part of the model, or keep the layer float with disable_names",
    )
