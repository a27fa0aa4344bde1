"""What a linear layer would compute under each treatment: a scheme, with or without outlier suppression.

All treatments follow from one replay of the float model, which keeps the extremes of each input channel in each step:
a smoothed layer's range is that of its channels, each multiplied by its factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.calibration.records import Record
from quant_core.calibration.replay import replay
from quant_core.calibration.timestep import TimestepManager
from quant_core.layers.calibrated import encode_linear
from quant_core.layers.deployed import DeployedArithmetic, DeployedLayer
from quant_core.naming import linear_at
from quant_core.parallel.groups import Reduction, reduce_many
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Derivation, Scheme
from quant_core.schemes.treatment import Treatment
from quant_core.session.observation import never_ran
from quant_core.session.session import Session
from quant_core.smoothing.smooth import Smoothing

# Fewer tokens do not make a range that the next ones keep to.
LEAST_TOKENS = 64


@dataclass
class ChannelRanges:
    """Keep the extremes of each channel of one input, by denoising step, and the tokens of one replay."""

    low: dict[int | None, Tensor] = field(default_factory=dict)
    high: dict[int | None, Tensor] = field(default_factory=dict)
    tokens: Counter[Any] = field(default_factory=Counter)

    def update(self, x: Tensor) -> None:
        """Take in one call; x: (..., I)."""
        step, x_NI = TimestepManager.get_timestep_idx(), x.detach().reshape(-1, x.shape[-1]).float()
        low_I, high_I = x_NI.aminmax(dim=0)
        self.low[step] = torch.minimum(self.low.get(step, low_I), low_I)
        self.high[step] = torch.maximum(self.high.get(step, high_I), high_I)
        self.tokens[step] += len(x_NI)

    def state(self, steps: Sequence[int | None], like: Tensor) -> Iterator[tuple[Reduction, Tensor, Callable]]:
        """Yield each extreme with its reduction over ranks and where the reduced one goes; like: (I,)."""
        nothing = torch.full_like(like, float("inf"))
        for step in steps:
            yield "min", self.low.get(step, nothing), partial(self.low.__setitem__, step)
            yield "max", self.high.get(step, -nothing), partial(self.high.__setitem__, step)
            yield "sum", torch.tensor(float(self.tokens[step])), partial(self.tokens.__setitem__, step)

    def tokens_of(self, scheme: Scheme) -> float:
        """Return how many tokens a range of the scheme rests on, in the step with the fewest."""
        return min(self.tokens.values()) if scheme.per_step else sum(self.tokens.values())


@dataclass(frozen=True)
class KnownRange:
    """Answer as the observer of a layer's input would: the range of a step, or of all of them."""

    found: ChannelRanges
    mul_scale_I: Tensor | None

    def range(self, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the low and the high end, scalars."""
        steps = list(self.found.low) if step is None else [step]
        low_I = torch.stack([self.found.low[s] for s in steps]).amin(0)
        high_I = torch.stack([self.found.high[s] for s in steps]).amax(0)
        factor_I = 1 if self.mul_scale_I is None else self.mul_scale_I.to(low_I)
        return (low_I * factor_I).amin(), (high_I * factor_I).amax()


def channel_ranges(session: Session, records: Sequence[Record]) -> dict[str, ChannelRanges]:
    """Replay records through the float model and return the ranges of every target layer's input, of all ranks.

    Raises InputError when a layer never ran in a step.
    """
    found = {name: ChannelRanges() for name in session.targets}
    with ExitStack() as stack:
        for name, ranges in found.items():
            hook = linear_at(session.model, name).register_forward_pre_hook(_watch(ranges))
            stack.callback(hook.remove)
        replay(session.model, records, stage="ranges", measured=found, progress=session.progress)
    steps = steps_of_records(session)
    parts = (
        part
        for name, ranges in found.items()
        for part in ranges.state(steps, linear_at(session.model, name).weight[0].float())
    )
    reduce_many(session.parallel.dp_group, parts)
    missing = [(name, step) for name, ranges in found.items() for step in steps if not ranges.tokens[step]]
    if missing:
        raise never_ran(*missing[0], len(missing))
    return found


def steps_of_records(session: Session) -> Sequence[int | None]:
    """Return the steps of the records, [None] where they do not say them."""
    return session.steps or [None]


def _watch(ranges: ChannelRanges) -> Callable[[nn.Module, Any], None]:
    return lambda linear, inputs: ranges.update(inputs[0])


def treated(
    session: Session, name: str, wanted: Sequence[Treatment], found: ChannelRanges, smoothing: Smoothing
) -> dict[Treatment, DeployedLayer]:
    """Return the layer as it would be deployed, on the host; a scheme that knows the step runs every step static.

    Treatments that differ in the scheme only share their codes.
    """
    group, numerics = session.parallel.scale_group(name), session.numerics
    linear, encoded, layers = linear_at(session.model, name), {}, {}
    for treatment in wanted:
        scheme, smoothed = SCHEMES[treatment.scheme], treatment.smoothed
        if smoothed not in encoded:
            rescaling = smoothing.rescalings.get(name) if smoothed else None
            coded = encode_linear(name, linear, scheme, numerics, scale_group=group, rescaling=rescaling)
            encoded[smoothed] = replace(coded, codes_OI=coded.codes_OI.cpu())
        layer = replace(encoded[smoothed], scheme=scheme, tensors={})
        layer.observer = KnownRange(found, layer.mul_scale_I)  # type: ignore[assignment]
        tensors = scheme.layer_tensors(layer, Derivation(session.steps_of(scheme), numerics, group))
        mul_scale = {} if layer.mul_scale_I is None else {"mul_scale": layer.mul_scale_I}
        layers[treatment] = DeployedLayer(DeployedArithmetic(name, scheme, 0), {**tensors, **mul_scale})
    return layers


def planned(session: Session, name: str, smoothing: Smoothing) -> Treatment:
    """Return the treatment that a layer has in the session."""
    return Treatment(session.plan[name].key, smoothed=name in smoothing.rescalings)


def treatments(session: Session, name: str, found: ChannelRanges, smoothing: Smoothing) -> list[Treatment]:
    """Return the treatments that can be chosen for a layer, plain ones first.

    None is static whose range would rest on few tokens: a modulation sees one for each image, and the next image's
    lies outside. Measured on a trained model with 12 prompts: 33 dB at the output where 44 were foretold.
    """
    outputs, steps = linear_at(session.model, name).out_features, steps_of_records(session)
    schemes = [
        scheme
        for scheme in SCHEMES.values()
        if outputs >= scheme.least_outputs
        and not (scheme.per_step and None in steps)
        and not (scheme.observes_input and found.tokens_of(scheme) < LEAST_TOKENS)
    ]
    plain = [Treatment(scheme.name) for scheme in schemes]
    if name not in smoothing.rescalings:
        return plain
    return plain + [Treatment(scheme.name, smoothed=True) for scheme in schemes if scheme.multiplies_input]


Layers = Mapping[str, Mapping[Treatment, DeployedLayer]]
