"""The separator that `--timestep_sep auto` advises against every other, by the output of the whole quantized model.

A step is static or dynamic, so the model with every step static and the one with every step dynamic tell what each
separator gives: the first model's error from it on, the second's below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quant_core.calibration.records import as_records
from quant_core.calibration.replay import replay
from quant_core.quality.decide import measure_layers, step_errors
from quant_core.quality.ratio import Ratio, total
from quant_core.quality.replayed import compare_outputs, kept_outputs
from quant_core.quality.separator import advised_separator
from quant_core.schemes.treatment import Treatment
from quant_core.session.targets import layer_plan
from scripts.choices.asked import Asked
from scripts.study.grid import Method
from scripts.study.subject import Subject

_METHOD = Method("w8a8_timestep")


@dataclass(frozen=True)
class Sweep:
    """Hold the separator that is advised, and the output's ratio in decibels by separator, from 0 to all steps."""

    advised: int
    outputs: Sequence[float]

    @property
    def best(self) -> int:
        """The first separator with the best output."""
        return self.outputs.index(max(self.outputs))

    @property
    def lost(self) -> float:
        """Decibels that the advised one gives less than the best."""
        return max(self.outputs) - self.outputs[self.advised]


def rows(asked: Asked) -> Iterator[Sequence[str]]:
    """Yield the table: a row for each model and seed."""
    yield ("model", "seed", "advised", "best", "output, advised", "output, best", "lost", "by separator")
    yield ("---",) * 8
    for model in asked.models:
        for seed in asked.seeds:
            found = sweep(asked.subject(model, seed))
            given, best = found.outputs[found.advised], found.outputs[found.best]
            numbers = (f"{each:.2f}" for each in (given, best, found.lost))
            curve = " ".join(f"{output:.1f}" for output in found.outputs)
            yield (model, str(seed), str(found.advised), str(found.best), *numbers, curve)


def sweep(subject: Subject) -> Sweep:
    """Measure the advice and all separators."""
    steps, treatment = subject.options.infer_steps, Treatment(_METHOD.scheme)
    config, model = subject.session(_METHOD, timestep_sep=0), subject.transformer
    found = measure_layers(model, config, given=layer_plan(model, config), structure=subject.adapter.structure)
    advised = advised_separator(*step_errors(found.layers, dict.fromkeys(found.layers, treatment), steps))
    static, dynamic = _by_step(subject, 0, steps)
    outputs = [total([*dynamic[:first], *static[first:]]).decibels for first in range(steps + 1)]
    return Sweep(advised, outputs)


def _by_step(subject: Subject, *separators: int) -> Iterator[list[Ratio]]:
    """Yield for each separator the output's ratio in each step of the pictures that are painted."""
    records = as_records(subject.captured(subject.painted))
    with kept_outputs(subject.transformer) as exact:
        replay(subject.transformer, records, stage="float outputs")
    for separator in separators:
        deployed = subject.quantized(subject.session(_METHOD, timestep_sep=separator))
        yield list(compare_outputs(deployed, records, exact).steps().values())
