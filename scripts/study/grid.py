"""Which quantizations the study compares, and on what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6ProcessorConfig,
    SessionConfig,
    W8A8QuantConfig,
)
from quant_core.ranges import ESTIMATORS
from quant_core.schemes import QUANT_TYPES, SCHEMES
from quant_core.schemes.option_rules import estimator_problems, smoothing_problems
from quant_core.smoothing.method import SmoothingConfig

# With the groups inside the blocks, which SD3 has alone: its others need context_embedder, which stays float.
SMOOTHINGS: dict[str, SmoothingConfig | None] = {
    "none": None,
    "m3": M3ProcessorConfig(smoothing_groups="all"),
    "m4": M4ProcessorConfig(smoothing_groups="all"),
    "m6": M6ProcessorConfig(smoothing_groups="all"),
}
# The scheme of each model's recipe, whose estimators and numerics are looked at.
STATIC = {"flux": "w8a8_timestep", "sd3": "w8a8"}
# What else a recipe has. Attention stays float: no runtime that we know reads its scales, so the linears are measured.
WITH_ATTENTION = {"flux": ("w8a8_dynamic_fa3",), "sd3": ()}


@dataclass(frozen=True)
class Method:
    """One way to quantize, in the words of the command line."""

    scheme: str
    smoothing: str = "none"
    estimator: str = "minmax"
    numerics: Any = "float32"

    @property
    def is_allowed(self) -> bool:
        """Tell whether its parts fit each other."""
        schemes = [QUANT_TYPES[self.scheme].scheme]
        return not [
            *estimator_problems(self.scheme, schemes, act_method=self.estimator, numerics=self.numerics),
            *smoothing_problems(self.scheme, schemes, multiplies_input=self.smoothing != "none"),
        ]

    def session(
        self,
        records: list[Any],
        disabled: tuple[str, ...],
        smoothings: Mapping[str, SmoothingConfig | None] = SMOOTHINGS,
        **options: Any,
    ) -> SessionConfig:
        """Say it in the quantizer's words. disabled: patterns of layers kept float; options: others of the scheme."""
        kind = QUANT_TYPES[self.scheme]
        scheme = kind.scheme.config(
            cfg=W8A8QuantConfig(act_method=self.estimator),  # pyright: ignore[reportArgumentType]
            disable_names=disabled,
            **options,
        )
        attention = FA3ProcessorConfig() if kind.with_attention else None
        parts = (scheme, smoothings[self.smoothing], attention)
        processors: dict[str, Any] = {each.key: each for each in parts if each}
        return SessionConfig(processor_cfg_map=processors, calib_data=records, numerics=self.numerics)


def chosen(kind: str) -> Iterator[Method]:
    """Yield the methods that say something: schemes, then what each choice changes in one of them."""
    static = STATIC[kind]
    yield from (Method(scheme) for scheme in (*SCHEMES, *WITH_ATTENTION[kind]))
    yield from (Method(static, estimator=name) for name in ESTIMATORS["float32"] if name != "minmax")
    yield from (Method(scheme, name) for scheme in (static, "w8a8_dynamic") for name in SMOOTHINGS if name != "none")
    yield from (Method(scheme, numerics="reference") for scheme in (static, "w8a8_dynamic"))
    yield Method(static, "m4", "mse")
    yield Method(static, "m4", numerics="reference")


def full() -> Iterator[Method]:
    """Yield all that is allowed, hundreds."""
    for parts in itertools.product(QUANT_TYPES, SMOOTHINGS, ESTIMATORS["float32"], ESTIMATORS):
        if (method := Method(*parts)).is_allowed:
            yield method
