"""m4's exponent by scheme: the output's ratio, and pictures at the model's own exponent.

Factors and ranges of all exponents follow from one look at the float model's inputs, as with `--calibrate online`; the
separator of the scheme that knows the step is 0, so that all its rows count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from quant_core import M4ProcessorConfig, SessionConfig
from quant_core.schemes import SCHEMES
from quant_core.smoothing.groups import Selection
from scripts.choices.asked import Asked, mean_and_error
from scripts.compare_online import online
from scripts.study.grid import Method
from scripts.study.subject import Subject

EXPONENTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# Those whose pictures are compared: one of the best by the output, and SD3's in the reference tool.
PAINTED = (0.6, 0.9)
_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if scheme.multiplies_input)


def rows(asked: Asked, groups: Selection = "all") -> Iterator[Sequence[str]]:
    """Yield the table: a row for each model and scheme, means over seeds; the model's own exponent is in brackets."""
    yield ("model", "scheme", *(f"{each:g}" for each in EXPONENTS))
    yield ("---",) * (2 + len(EXPONENTS))
    for model in asked.models:
        subjects = [asked.subject(model, seed) for seed in asked.seeds]
        own = subjects[0].adapter.structure.m4_alpha
        for scheme in _SCHEMES:
            curves = [list(outputs(subject, scheme, groups)) for subject in subjects]
            means = [f"{mean(each):.2f}" for each in zip(*curves)]
            marked = (f"({text})" if exponent == own else text for exponent, text in zip(EXPONENTS, means))
            yield (model, scheme, *marked)


def pictures(asked: Asked) -> Iterator[Sequence[str]]:
    """Yield the table of pictures: the mean PSNR over seeds, and by how much each exponent is above the last."""
    *others, last = PAINTED
    yield ("model", "scheme", *(f"{each:g}" for each in PAINTED), *(f"{each:g} over {last:g}" for each in others))
    yield ("---",) * (1 + 2 * len(PAINTED))
    for model in asked.models:
        subjects = [asked.subject(model, seed) for seed in asked.seeds]
        for scheme in _SCHEMES:
            found = [[one for each in subjects for one in _painted(each, scheme, exponent)] for exponent in PAINTED]
            gains = (mean_and_error([a - b for a, b in zip(each, found[-1])]) for each in found[:-1])
            yield (model, scheme, *(f"{mean(each):.2f}" for each in found), *gains)


def _painted(subject: Subject, scheme: str, exponent: float) -> list[float]:
    deployed = subject.quantized(online(subject, session(subject, scheme, exponent)))
    return subject.psnrs(deployed, f"{scheme} {exponent}")


def outputs(subject: Subject, scheme: str, groups: Selection) -> Iterator[float]:
    """Yield the output's ratio in decibels by exponent."""
    seen = online(subject, session(subject, scheme, EXPONENTS[0], groups))
    for exponent in EXPONENTS:
        config = session(subject, scheme, exponent, groups).model_copy(update={"calib_data": seen.calib_data})
        yield subject.output(subject.quantized(config)).overall.decibels


def session(subject: Subject, scheme: str, exponent: float, groups: Selection = "all") -> SessionConfig:
    """Return a session with m4 on groups of layers."""
    sep: dict[str, Any] = {"timestep_sep": 0} if SCHEMES[scheme].per_step else {}
    config = subject.session(Method(scheme), **sep)
    m4 = M4ProcessorConfig(alpha=exponent, smoothing_groups=groups)
    return config.model_copy(update={"processor_cfg_map": {**config.processor_cfg_map, "m4": m4}})
