"""Decide for each layer how it is quantized, by what each way costs at the model's output: the whole of it.

    smoothing factors → input ranges (one replay) → noise of every treatment → gain of every layer → choice → check

Ranges come from one half of the records and noise is measured on the other, at most RECORDS_PER_STEP of at most
MOST_STEPS steps; gains on one record of each of these steps. Numbers are summed over all ranks, so that all come to
the same choice. Layers whose treatment is given are measured with it, and with what it is compared with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from quant_core.attention.rotated_values import rotate_values
from quant_core.calibration.records import Record
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.errors import ConfigurationError
from quant_core.layers.deployed import DeployedLayer
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel, reduce_over
from quant_core.quality.budget import COSTS, DYNAMIC, Budget
from quant_core.quality.choice import Candidate, Choice, choose
from quant_core.quality.output_error import add_up, in_place_of, layer_noise, of_tokens, of_weight, output_gains
from quant_core.quality.ratio import StepRatios
from quant_core.quality.replayed import HELD_BYTES, compare_outputs, evenly_spaced, held_together, kept_outputs
from quant_core.quality.separator import every_step
from quant_core.quality.treatments import (
    ChannelRanges,
    channel_ranges,
    planned,
    treated,
    treatments,
)
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Inputs
from quant_core.schemes.treatment import FLOAT, Treatment
from quant_core.session.checks import check_float, check_numerics, check_records
from quant_core.session.config import SessionConfig
from quant_core.session.quantize import smoothing_of, untie
from quant_core.session.session import Session
from quant_core.smoothing.smooth import Smoothing
from quant_core.structure import ModelStructure, find_structure

RECORDS_PER_STEP = 6
MOST_STEPS = 8
_WEIGHT_ONLY = Treatment(next(name for name, scheme in SCHEMES.items() if scheme.inputs is Inputs.FLOAT))


@dataclass(frozen=True)
class LayerErrors:
    """Hold what was measured of one layer: its work, and by treatment and step the error at the output, a share.

    given: the treatment that it has, whatever else was measured; None: one is to be chosen.
    """

    work: float
    errors: Mapping[Treatment, Mapping[int | None, float]]
    bytes: Mapping[Treatment, float]
    given: Treatment | None = None


@dataclass(frozen=True)
class Measurement:
    """Hold what was measured of every layer, and all that is needed to try a choice on the whole model."""

    layers: Mapping[str, LayerErrors]
    session: Session
    smoothing: Smoothing
    ranges: Mapping[str, ChannelRanges]
    held_out: Sequence[Record]
    steps: Sequence[int | None]

    @torch.no_grad()
    def output(self, chosen: Mapping[str, Treatment]) -> StepRatios:
        """Return the output's ratio with all layers treated as chosen, on one held-out record of each step.

        The codes of all layers are held on the host. Rows of steps count as static in every step.
        """
        session, model, exact = self.session, self.session.model, self._exact
        with ExitStack() as stack:
            for name, treatment in chosen.items():
                if treatment.scheme != FLOAT:
                    layer = treated(session, name, [treatment], self.ranges[name], self.smoothing)[treatment]
                    hook = linear_at(model, name).register_forward_hook(in_place_of(layer), prepend=True)
                    stack.callback(hook.remove)
            ratios = compare_outputs(model, self._tried, exact, progress=session.progress)
        add_up([ratios], self.steps, replace(session.parallel, tp_group=None))
        return ratios

    @cached_property
    def _tried(self) -> list[Record]:
        return _some(self.held_out, self.steps, 1)

    @cached_property
    def _exact(self) -> list[Tensor]:
        """The float model's outputs, on the host, once for all that is tried."""
        with kept_outputs(self.session.model) as exact:
            replay(self.session.model, self._tried, stage="float outputs", progress=self.session.progress)
        return exact


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    config: SessionConfig,
    *,
    given: Collection[str] = (),
    structure: ModelStructure | None = None,
    parallel: Parallel | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Measure every treatment of every layer that the session would quantize; the model stays float.

    Where the session rotates values, the model is left rotated, and a rotated layer cannot be chosen to stay float.

    config: a session whose outlier suppression, if any, is tried on each layer. given: the layers that keep the
    treatment they have in the session. Raises ConfigurationError for fused outlier suppression, and InputError for
    records that do not cover every layer and step.
    """
    session = Session(model, config, structure or find_structure(model), parallel or Parallel(), progress)
    _check_unfused(config)
    check_float(model)
    check_numerics(session)
    check_records(session)
    untie(model, session.rotations.linears)
    rotate_values(model, session.rotations.linears)
    fitted, held_out = _halves(session.records)
    smoothing, ranges = smoothing_of(session), channel_ranges(session, fitted)
    kept = sorted(evenly_spaced(session.steps, MOST_STEPS)) or [None]
    plan = {name: planned(session, name, smoothing) for name in given}
    wanted = {
        name: _compared(plan[name]) if name in plan else treatments(session, name, ranges[name], smoothing)
        for name in session.targets
    }
    sizes, noise = _measure_noise(session, smoothing, ranges, wanted, held_out, kept)
    probed = _some(held_out, kept, 1)
    of_codes, of_inputs = (
        output_gains(model, session.targets, probed, kept, error, session.parallel, progress=progress)
        for error in (of_weight, of_tokens)
    )
    gains = _Gains(of_codes, of_inputs, dict(zip(kept, _shares(session, held_out, kept).tolist())))
    layers = {
        name: LayerErrors(
            _work(session, name, ranges[name]),
            {t: gains.errors(name, noise[name], t) for t in wanted[name]}
            | ({} if name in session.rotations.linears else {Treatment(FLOAT): dict.fromkeys(kept, 0.0)}),
            sizes[name],
            plan.get(name),
        )
        for name in session.targets
    }
    return Measurement(layers, session, smoothing, ranges, held_out, kept)


def _check_unfused(config: SessionConfig) -> None:
    if config.smoothing is not None and config.smoothing.fused:
        raise ConfigurationError(
            "layers cannot be measured with fused smoothing",
            where=f"processor_cfg_map['{config.smoothing.key}'], fused",
            why="each is tried alone in the float model, where no layer in front divides what it multiplies",
            advice="measure with fused=False, or choose without measuring",
        )


def _compared(treatment: Treatment) -> list[Treatment]:
    """Return a given treatment and what is needed beside it: its steps that run dynamic, and the noise of its codes."""
    dynamic = [treatment._replace(scheme=DYNAMIC)] if SCHEMES[treatment.scheme].per_step else []
    return list(dict.fromkeys([treatment, *dynamic, _WEIGHT_ONLY]))


@dataclass(frozen=True)
class _Gains:
    """Turn a layer's noise into error at the output.

    of_weight, of_tokens: gains by layer and step. share: by step, the records that made a gain over those that made
    the noise, because both are sums over the records of all ranks.
    """

    of_weight: Mapping[str, Mapping[int | None, float]]
    of_tokens: Mapping[str, Mapping[int | None, float]]
    share: Mapping[int | None, float]

    def errors(self, name: str, noise: Mapping[Treatment, StepRatios], treatment: Treatment) -> dict[int | None, float]:
        """Return a treatment's error by step; of its noise, what the plain weight's codes make counts as theirs."""
        found = {}
        for step, share in self.share.items():
            whole = noise[treatment].by_step[step].noise
            codes = min(whole, noise[_WEIGHT_ONLY].by_step[step].noise)
            energy = codes * self.of_weight[name][step] + (whole - codes) * self.of_tokens[name][step]
            found[step] = energy * share
        return found


def choose_layers(found: Measurement, budget: Budget, costs: Mapping[str, float] = COSTS) -> Choice:
    """Choose a treatment for each layer, and check the choice on the whole model.

    Where outlier suppression was tried, the choice without any stands against it, and the better one is returned.
    """
    rows = candidates(found.layers, costs)
    plain = {
        name: (work, [c for c in of_layer if not c.treatment.smoothed or found.layers[name].given])
        for name, (work, of_layer) in rows.items()
    }
    choices = [choose(each, budget, costs) for each in ([rows] if plain == rows else [rows, plain])]
    for choice in choices:
        choice.measured = found.output({c.name: c.chosen.treatment for c in choice.layers}).overall.decibels
    return max(choices, key=lambda choice: choice.measured or 0.0)


def candidates(
    found: Mapping[str, LayerErrors], costs: Mapping[str, float]
) -> dict[str, tuple[float, list[Candidate]]]:
    """Return each layer's work and candidates, one where the treatment is given; errors of steps count alike."""
    return {
        name: (
            layer.work,
            [
                Candidate(t, math.fsum(errors.values()) / len(errors), layer.work * costs[t.scheme], layer.bytes[t])
                for t, errors in layer.errors.items()
                if layer.given in (None, t)
            ],
        )
        for name, layer in found.items()
    }


def step_errors(
    found: Mapping[str, LayerErrors], chosen: Mapping[str, Treatment], timesteps: int
) -> tuple[list[float], list[float]]:
    """Return the error of each step when layers that know the step run static, and when they run dynamic.

    chosen: the treatment of each layer that is quantized. Steps between the sampled ones are interpolated.
    """
    sums: list[dict[int, float]] = []
    for scheme in (None, DYNAMIC):
        by_step: Counter[int] = Counter()
        for name, treatment in chosen.items():
            knows_step = treatment.scheme != FLOAT and SCHEMES[treatment.scheme].per_step
            used = treatment._replace(scheme=scheme) if scheme and knows_step else treatment
            by_step.update({step: error for step, error in found[name].errors[used].items() if step is not None})
        sums.append(dict(by_step))
    return every_step(sums[0], timesteps), every_step(sums[1], timesteps)


def _measure_noise(
    session: Session,
    smoothing: Smoothing,
    ranges: Mapping[str, ChannelRanges],
    wanted: Mapping[str, Sequence[Treatment]],
    held_out: Sequence[Record],
    steps: Sequence[int | None],
) -> tuple[dict[str, dict[Treatment, float]], dict[str, dict[Treatment, StepRatios]]]:
    """Return the bytes and the noise of every treatment of every layer, with a few layers' codes held at a time."""
    sizes: dict[str, dict[Treatment, float]] = {}
    noise: dict[str, dict[Treatment, StepRatios]] = {}
    records = _some(held_out, steps, RECORDS_PER_STEP)
    weights = {name: 2 * linear_at(session.model, name).weight.numel() for name in wanted}
    for names in held_together(weights, HELD_BYTES):
        layers = {name: treated(session, name, wanted[name], ranges[name], smoothing) for name in names}
        sizes |= {name: _bytes(session, name, of_layer) for name, of_layer in layers.items()}
        noise |= layer_noise(session.model, layers, records, steps, session.parallel, progress=session.progress)
    return sizes, noise


def _bytes(session: Session, name: str, layers: Mapping[Treatment, DeployedLayer]) -> dict[Treatment, float]:
    """Return the bytes of each treatment of a layer, on all ranks that hold a part of it."""
    found = {t: _size(layer.tensors) for t, layer in layers.items()}
    found[Treatment(FLOAT)] = _size(linear_at(session.model, name).state_dict())
    sums = reduce_over(session.parallel.tp_group, "sum", torch.tensor(list(found.values())))
    return dict(zip(found, map(float, sums.tolist())))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return every other record of each step, to find ranges, and the others, to see what lies outside of them.

    Measured on the records that they come from, narrow ranges would look better than they are: nothing is clipped. A
    step's only record is in both.
    """
    fitted: list[Record] = []
    held_out: list[Record] = []
    for step in dict.fromkeys(record.step for record in records):
        of_step = [record for record in records if record.step == step]
        fitted += of_step[::2]
        held_out += of_step[1::2] or of_step
    return fitted, held_out


def _shares(session: Session, held_out: Sequence[Record], steps: Sequence[int | None]) -> Tensor:
    one, several = (_counts(session, _some(held_out, steps, most), steps) for most in (1, RECORDS_PER_STEP))
    return one / several


def _counts(session: Session, records: Sequence[Record], steps: Sequence[int | None]) -> Tensor:
    """Return how many of the records, of all ranks, are of each step."""
    counts = Counter(record.step for record in records)
    return reduce_over(session.parallel.dp_group, "sum", torch.tensor([float(counts[step]) for step in steps]))


def _some(records: Sequence[Record], steps: Sequence[int | None], most: int) -> list[Record]:
    """Return at most so many records of each of the steps, evenly spaced among those of the step."""
    found: list[Record] = []
    for step in steps:
        of_step = [record for record in records if record.step == step]
        found += [of_step[index] for index in sorted(evenly_spaced(range(len(of_step)), most))]
    return found


def _work(session: Session, name: str, ranges: ChannelRanges) -> float:
    """Return the multiplications of the layer in the fitted records of all ranks."""
    mine = torch.tensor(float(sum(ranges.tokens.values()) * linear_at(session.model, name).weight.numel()))
    return float(reduce_over(session.parallel.tp_group, "sum", mine))
