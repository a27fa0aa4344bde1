"""Measure what a session needs of activations while a pipeline runs the float model: one forward a record, not two.

What differs from replaying: a replayed layer sees its input as it is behind the quantized layers in front of it, here
the float model's own. What the ranges are made of, and what the ranks agree on, is the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.attention.watch import watch_attentions
from quant_core.calibration.finite import FiniteInputs
from quant_core.calibration.measured import Measured
from quant_core.calibration.observers import InputObserver
from quant_core.calibration.replay import silent
from quant_core.calibration.timestep import TimestepManager
from quant_core.errors import ConfigurationError
from quant_core.layers.calibrated import encode_linear
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel
from quant_core.ranges.channel_importance import channel_importance
from quant_core.ranges.estimator import RangeEstimator
from quant_core.ranges.extremes import ChannelExtremes
from quant_core.session.config import SessionConfig
from quant_core.session.float_forwards import Kept, require_second_look_is_needless, what_is_kept
from quant_core.session.session import Session
from quant_core.structure import ModelStructure, find_structure


class OnlineCalibration:
    """Watch a float model's own forwards for a session on it.

    structure: found by the model's class when left out. parallel: this rank's place, when the model is a shard.
    step_source: returns the index of the current denoising step; `TimestepManager` is asked when left out.
    Raises ConfigurationError for a session that needs a second look.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        config: SessionConfig,
        *,
        structure: ModelStructure | None = None,
        parallel: Parallel | None = None,
        step_source: Callable[[], int | None] = TimestepManager.get_timestep_idx,
    ) -> None:
        require_second_look_is_needless(config)
        session = Session(model, config, structure or find_structure(model), parallel or Parallel(), silent)
        self._model, self._step_source, self._per_step = model, step_source, session.per_step
        kept = what_is_kept(session)
        self._layers, self._attentions = dict(_observers(session, kept)), session.attentions
        self._kept = {name: each.text for name, each in kept.items()}
        self._forwards = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forwards inside the block. They raise InputError where a watched layer gets NaN or infinity."""
        finite = FiniteInputs()
        with ExitStack() as stack:
            for name, observer in self._layers.items():
                hook = linear_at(self._model, name).register_forward_pre_hook(_watch(name, observer, finite))
                stack.callback(hook.remove)
            stack.enter_context(watch_attentions(self._model, self._attentions))
            stack.callback(TimestepManager.set_timestep_idx, TimestepManager.get_timestep_idx())
            stack.callback(self._model.register_forward_pre_hook(self._begin).remove)
            stack.callback(self._model.register_forward_hook(partial(self._end, finite)).remove)
            yield

    def measured(self) -> Measured:
        """Return all that was seen until now, on the host."""
        return Measured(
            self._forwards,
            {name: observer.saved() for name, observer in self._layers.items()},
            {name: observer.saved() for name, observer in self._attentions.items()},
            self._kept,
        )

    def restore(self, measured: Measured) -> None:
        """Go on from what an earlier one has measured for the same session."""
        self._forwards = measured.forwards
        for name, observer in self._layers.items():
            observer.restore(measured.of_layer(name))
        for name, observer in self._attentions.items():
            observer.restore(measured.of_attention(name))

    def _begin(self, model: nn.Module, args: Any) -> None:
        step = self._step_source()
        if step is None and self._per_step:
            raise ConfigurationError(
                "the denoising step of a forward is unknown",
                where=f"calibrating {type(model).__name__}",
                why="the session keeps a range for each step, and no step_source was given or it knows none",
                advice="set the index at the start of each step: TimestepManager.set_timestep_idx",
            )
        TimestepManager.set_timestep_idx(step)

    def _end(self, finite: FiniteInputs, model: nn.Module, args: Any, output: Any) -> None:
        finite.check(f"{type(model).__name__}.forward, step {TimestepManager.get_timestep_idx()}")
        self._forwards += 1


def _watch(name: str, observer: InputObserver, finite: FiniteInputs) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    @torch.no_grad()
    def watch(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        finite.note(name, *observer.measure(inputs[0]))

    return watch


def _observers(session: Session, layers: Mapping[str, Kept]) -> Iterator[tuple[str, InputObserver]]:
    """Yield what watches the input of each layer that needs it: by channel where smoothing may divide it."""
    for name, kept in layers.items():
        fresh: Callable[[], RangeEstimator] = ChannelExtremes
        if not kept.by_channel:
            fresh = partial(session.estimator_of(name).fresh, _importance(session, name))
        yield name, InputObserver(session.numerics, fresh, per_step=kept.per_step)


def _importance(session: Session, name: str) -> Tensor | None:
    """Return what the layer's channels are worth, if its estimator asks: of the codes that it will have."""
    if not session.estimator_of(name).weighs_channels:
        return None
    group = session.parallel.scale_group(name)
    layer = encode_linear(
        name, linear_at(session.model, name), session.scheme_of(name), session.numerics, scale_group=group
    )
    return channel_importance(name, layer.codes_OI, layer.weight_scale_O1, session.parallel)
