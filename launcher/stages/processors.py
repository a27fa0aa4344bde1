"""Say in the quantizer's words what the options of a job ask for: data from data, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from launcher.config.job_config import Quantization
from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    W8A8TimeStepProcessorConfig,
)
from quant_core.errors import ConfigurationError
from quant_core.processor import ProcessorConfig

# What a quantization type of the command line means as processors: the scheme, and whether attention is quantized.
_SCHEMES: dict[str, Callable[[Quantization, dict[str, Any]], list[ProcessorConfig]]] = {
    "w8a8": lambda options, common: [W8A8ProcessorConfig(**common)],
    "w8a8_timestep": lambda options, common: [W8A8TimeStepProcessorConfig(**common, timestep_sep=options.timestep_sep)],
    "w8a8_dynamic": lambda options, common: [W8A8DynamicProcessorConfig(**common)],
    "w8a8_dynamic_fa3": lambda options, common: [W8A8DynamicProcessorConfig(**common), FA3ProcessorConfig()],
}
_SMOOTHING: dict[str | None, Callable[[Quantization, dict[str, Any]], list[ProcessorConfig]]] = {
    None: lambda options, common: [],
    "m3": lambda options, common: [M3ProcessorConfig(**common)],
    "m4": lambda options, common: [M4ProcessorConfig(**common, alpha=options.anti_alpha)],
    "m6": lambda options, common: [
        M6ProcessorConfig(**common, cfg=M6Config(alpha=options.anti_alpha, beta=options.anti_beta))
    ],
}


def processors(options: Quantization, disabled_layers: Sequence[str]) -> list[ProcessorConfig]:
    """Return the processors of a job: its scheme, its attention quantization, its outlier suppression."""
    scheme = {"cfg": W8A8QuantConfig(act_method=options.act_method), "disable_names": disabled_layers}
    smoothed = {"smoothing_groups": options.anti_groups, "fused": options.anti_fused}
    return [*_SCHEMES[options.quant_type](options, scheme), *_SMOOTHING[options.anti_method](options, smoothed)]


def session_of(found: Sequence[ProcessorConfig], options: Quantization, records: list[Any]) -> SessionConfig:
    """Return the session of these processors; raises ConfigurationError for processors that exclude each other."""
    try:
        return SessionConfig(
            processor_cfg_map={processor.key: processor for processor in found},
            calib_data=records,
            numerics=options.numerics,
        )
    except ValidationError as error:
        problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors(include_url=False)]
        raise ConfigurationError(
            "the quantization options do not fit each other",
            where="--quant_type, --anti_method, --act_method, --numerics",
            why="; ".join(problems),
            advice="change one of them",
        ) from None
