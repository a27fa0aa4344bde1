"""Which options do not fit a scheme or each other; said once for sessions and for command lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from quant_core.errors import ConfigurationError
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Scheme


class OptionNames(NamedTuple):
    """What the reader of an error knows the options by."""

    scheme: str = "processor_cfg_map"
    act_method: str = "act_method"
    numerics: str = "numerics"
    fused: str = "fused=True"
    smoothing: str = "the outlier suppression"
    layer_schemes: str = "layer_schemes"


def schemes_that(have: Callable[[Scheme], bool]) -> str:
    """Name the schemes of which something holds, as a choice: "a, b or c"."""
    *others, last = [name for name, scheme in SCHEMES.items() if have(scheme)]
    return f"{', '.join(others)} or {last}" if others else last


def estimator_problems(
    quant_type: str,
    schemes: Sequence[Scheme],
    *,
    act_method: str,
    numerics: str,
    called: OptionNames = OptionNames(),  # noqa: B008, it is immutable
) -> Iterator[ConfigurationError]:
    """Yield what does not fit an estimator. quant_type: the scheme as it was asked for; schemes: what layers get."""
    if act_method != "minmax" and not any(scheme.observes_input for scheme in schemes):
        yield ConfigurationError(
            f"{called.act_method} {act_method} has no meaning for {quant_type}",
            where=f"{called.act_method}, {called.scheme}",
            why=f"no activation range is estimated: {schemes[0].summary}",
            advice=f"drop {called.act_method}, or use {schemes_that(lambda other: other.observes_input)}",
        )
    elif act_method != "minmax" and numerics == "reference":
        yield ConfigurationError(
            f"{called.act_method} {act_method} is no estimator of {called.numerics} reference",
            where=f"{called.act_method}, {called.numerics}",
            why="what the reference tool computes for it is not public; only minmax can be equal to the last bit",
            advice=f"{called.numerics} float32, or {called.act_method} minmax",
        )


def smoothing_problems(
    quant_type: str,
    schemes: Sequence[Scheme],
    *,
    multiplies_input: bool,
    fused_with_plain: bool = False,
    called: OptionNames = OptionNames(),  # noqa: B008, it is immutable
) -> Iterator[ConfigurationError]:
    """Yield what does not fit a smoothing, as `estimator_problems`.

    multiplies_input: smoothing, not fused. fused_with_plain: fused, where some layers are to be left without it.
    """
    if fused_with_plain:
        yield ConfigurationError(
            f"no layer can be left without outlier suppression with {called.fused}",
            where=f"{called.smoothing}, {called.layer_schemes}",
            why="the layer in front divides what it makes, and so the input of every layer behind it",
            advice=f"drop {called.fused}, or say nothing of plain layers",
        )
    if multiplies_input and not any(scheme.multiplies_input for scheme in schemes):
        yield ConfigurationError(
            f"{quant_type} can only be smoothed with {called.fused}",
            where=f"{called.smoothing}, {called.scheme}",
            why="its runtime does not multiply the input, so a layer smoothed in that way would compute something else",
            advice=f"add {called.fused}, or drop {called.smoothing}",
        )
