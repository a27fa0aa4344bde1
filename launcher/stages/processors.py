"""Say in the quantizer's words what the options of a job ask for: data from data, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from launcher.config.job_config import AUTO, Quantization
from model_adapters.adapter import ModelAdapter
from quant_core import FA3ProcessorConfig, M6Config, SessionConfig, W8A8QuantConfig
from quant_core.calibration.measured import Measured
from quant_core.errors import ConfigurationError
from quant_core.processor import ProcessorConfig
from quant_core.schemes import QUANT_TYPES, SCHEMES
from quant_core.schemes.scheme import Scheme, SchemeConfig
from quant_core.schemes.treatment import FLOAT, Treatment
from quant_core.smoothing import METHODS

Config = TypeVar("Config", bound=ProcessorConfig)
# The separator where `auto` chooses rows for each step: it has measured them in every step.
ROWS_IN_EVERY_STEP = 0


def disabled_layers_of(options: Quantization, adapter: ModelAdapter) -> tuple[str, ...]:
    """Return the patterns of layers to keep float: the user's, else those of the model's recipe."""
    return adapter.disabled_layers[options.main_type] if options.disable_names is None else options.disable_names


def processors(options: Quantization, disabled_layers: Sequence[str]) -> list[ProcessorConfig]:
    """Return the processors of a job: its scheme, its attention quantization, its outlier suppression."""
    scheme, with_attention = QUANT_TYPES[options.main_type]
    found: list[ProcessorConfig] = [_scheme_config(scheme, options, disable_names=disabled_layers)]
    if with_attention:
        found.append(FA3ProcessorConfig())
    if options.smoothing_method is not None:
        suppression = _configured(
            METHODS[options.smoothing_method].config,
            smoothing_groups="every" if options.is_auto else options.anti_groups,
            fused=options.anti_fused,
            alpha=options.anti_alpha,
            cfg=M6Config(alpha=options.anti_alpha, beta=options.anti_beta),
        )
        found.append(suppression)
    return found


def layer_schemes(options: Quantization) -> dict[str, SchemeConfig | Literal["float"]]:
    """Return the layers that get another scheme, by pattern in the order that counts."""
    chosen = {pattern: Treatment.of(value) for pattern, value in options.layer_schemes.items()}
    return {
        pattern: "float" if scheme == FLOAT else _scheme_config(SCHEMES[scheme], options, smoothed=smoothed)
        for pattern, (scheme, smoothed) in chosen.items()
    }


def _scheme_config(scheme: Scheme, options: Quantization, **chosen: Any) -> SchemeConfig:
    act_method = options.act_method if scheme.observes_input else "minmax"
    cfg = W8A8QuantConfig(act_method=act_method)
    separator = ROWS_IN_EVERY_STEP if options.is_auto and options.timestep_sep is None else options.timestep_sep
    separator = None if separator == AUTO else separator
    return _configured(scheme.config, cfg=cfg, timestep_sep=separator, **chosen)


def _configured(config: type[Config], **options: Any) -> Config:
    """Make a processor of those options that it has; the job's rules refuse the others when somebody gives them."""
    return config(**{name: value for name, value in options.items() if name in config.model_fields})


def session_of(found: Sequence[ProcessorConfig], options: Quantization, records: list[Any] | Measured) -> SessionConfig:
    """Return the session of these processors; raises ConfigurationError for processors that exclude each other."""
    try:
        return SessionConfig(
            processor_cfg_map={processor.key: processor for processor in found},
            layer_schemes=layer_schemes(options),
            rotate_values=options.rotate_values,
            calib_data=records,
            numerics=options.numerics,
        )
    except ValidationError as error:
        problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors(include_url=False)]
        raise ConfigurationError(
            "the quantization options do not fit each other",
            where="--quant_type, --layer_schemes, --anti_method, --act_method, --numerics",
            why="; ".join(problems),
            advice="change one of them",
        ) from None
