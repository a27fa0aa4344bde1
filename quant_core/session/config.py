"""What to do to a model, as validated data: the configuration of `quant_model`.

The names are those of the field's tools: a `SessionConfig` holds a map of processors (one scheme, at most one outlier
suppression, FA3, save), the calibration data and the device. The order of the map does not matter. Everything that
would be silently ignored or contradict itself is refused here, before a model is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, InstanceOf, SerializeAsAny, field_validator, model_validator

from quant_core.attention.session import FA3ProcessorConfig
from quant_core.errors import ConfigurationError, suggestion
from quant_core.processor import ProcessorConfig, StrictModel
from quant_core.schemes import SCHEMES
from quant_core.schemes.option_rules import estimator_problems, schemes_that, smoothing_problems
from quant_core.schemes.scheme import PerStepConfig, SchemeConfig
from quant_core.smoothing import METHODS
from quant_core.smoothing.method import SmoothingConfig


class SaveProcessorConfig(ProcessorConfig):
    """Write the checkpoint: safetensors and description in `output_path`.

    `part_file_size`: split the tensors into files of at most so many GB (10**9 bytes) with an index; one file when
    left out, the only form that MindIE-SD reads.
    """

    key: ClassVar[str] = "save"
    kind: ClassVar[str] = "save"
    output_path: str
    safetensors_name: str | None = None
    json_name: str | None = None
    save_type: list[Literal["safe_tensor"]] = Field(default_factory=lambda: ["safe_tensor"], min_length=1)
    part_file_size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    metadata: dict[str, str] = Field(default_factory=dict)


_PROCESSORS: dict[str, type[ProcessorConfig]] = {
    config.key: config
    for config in (
        *(scheme.config for scheme in SCHEMES.values()),
        *(method.config for method in METHODS.values()),
        FA3ProcessorConfig,
        SaveProcessorConfig,
    )
}


class SessionConfig(StrictModel):
    """Describe one quantization: processors by name, calibration data, device and numerics.

    layer_schemes: layers that get another scheme than the map's one, or stay "float": by pattern, the first match
    wins, and it wins over `disable_names`. A scheme is its configuration, or its name with nothing chosen.
    rotate_values: rotate the values inside each head of all attentions whose layers are quantized.
    calib_data: records as `DumperManager` saves them, or a list of positional argument lists.
    device: where to run ("npu", "cuda", "cpu"); where the model is when left out. dev_id: its index, if it has one.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    processor_cfg_map: dict[str, SerializeAsAny[InstanceOf[ProcessorConfig]]]
    layer_schemes: dict[str, SerializeAsAny[InstanceOf[SchemeConfig]] | Literal["float"]] = Field(default_factory=dict)
    rotate_values: bool = False
    calib_data: Any = None
    device: str | None = None
    dev_id: int | None = Field(default=None, ge=0)
    numerics: Literal["float32", "reference"] = "float32"

    @field_validator("layer_schemes", mode="before")
    @classmethod
    def _schemes_by_name(cls, rules: Any) -> Any:
        if not isinstance(rules, Mapping):
            return rules
        names = (*SCHEMES, "float")
        for pattern, scheme in rules.items():
            if isinstance(scheme, str) and scheme not in names:
                raise ValueError(f"'{pattern}': no scheme is called '{scheme}': try {suggestion(scheme, names)}")
        return {p: SCHEMES[s].config() if isinstance(s, str) and s in SCHEMES else s for p, s in rules.items()}

    @model_validator(mode="after")
    def _processors_fit(self) -> SessionConfig:
        for key, processor in self.processor_cfg_map.items():
            _check_key(key, processor)
        for kind in ("quantization scheme", "outlier suppression"):
            keys = [key for key, processor in self.processor_cfg_map.items() if processor.kind == kind]
            if len(keys) > 1:
                raise ValueError(f"{' and '.join(keys)} are each a {kind}: a session has one, so drop all but one")
        if not any(isinstance(processor, SchemeConfig) for processor in self.processor_cfg_map.values()):
            raise ValueError(f"no quantization scheme: add {schemes_that(lambda scheme: True)}")
        without = [config.key for config in self.schemes if not SCHEMES[config.key].with_attention]
        if self.fa3 and without:
            those = schemes_that(lambda scheme: scheme.with_attention)
            raise ConfigurationError(
                f"fa3 goes with {those} only, not with {without[0]}",
                where="processor_cfg_map" if without[0] == self.scheme.key else "layer_schemes",
                why="a runtime that quantizes attention quantizes the linear layers around it token by token",
                advice=f"replace the scheme by {those}, or drop fa3",
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> SessionConfig:
        fused = self.smoothing is not None and self.smoothing.fused
        problems = [
            estimator_problems(c.key, [SCHEMES[c.key]], act_method=c.cfg.act_method, numerics=self.numerics)
            for c in self.schemes
        ]
        schemes = [SCHEMES[config.key] for config in self.schemes]
        smoothing = smoothing_problems(
            self.scheme.key,
            schemes,
            multiplies_input=self.smoothing is not None and not fused,
            fused_with_plain=fused and not all(config.smoothed for config in self.schemes),
        )
        for problem in chain(*problems, smoothing):
            raise problem
        if self.dev_id is not None and (self.device is None or ":" in self.device):
            raise ValueError(f"dev_id is {self.dev_id}, and device is {self.device!r}: say a kind of device beside it")
        disabled = [c for c in self.layer_schemes.values() if c != "float" and c.disable_names]
        if disabled:
            raise ValueError(f"layer_schemes holds disable_names {disabled[0].disable_names}: say 'float' of these")
        if self.smoothing is not None and not any(config.smoothed for config in self.schemes):
            raise ValueError(f"{self.smoothing.key} has no layer to smooth: every scheme says smoothed=False")
        separators = {config.timestep_sep for config in self.schemes if isinstance(config, PerStepConfig)}
        if len(separators) > 1:
            raise ValueError(f"timestep_sep is {separators}: a runtime has one, for all layers")
        return self

    @property
    def scheme(self) -> SchemeConfig:
        """Return the scheme of all layers that `layer_schemes` does not name; the checkpoint is called after it."""
        return next(p for p in self.processor_cfg_map.values() if isinstance(p, SchemeConfig))

    @property
    def schemes(self) -> list[SchemeConfig]:
        """Return every scheme that a layer may get."""
        return [self.scheme, *(config for config in self.layer_schemes.values() if config != "float")]

    @property
    def smoothing(self) -> SmoothingConfig | None:
        """Return the outlier suppression, if any."""
        return next((p for p in self.processor_cfg_map.values() if isinstance(p, SmoothingConfig)), None)

    @property
    def fa3(self) -> FA3ProcessorConfig | None:
        """Return the attention quantization, if any."""
        return next((p for p in self.processor_cfg_map.values() if isinstance(p, FA3ProcessorConfig)), None)

    @property
    def save(self) -> SaveProcessorConfig | None:
        """Return where to save, if anywhere."""
        return next((p for p in self.processor_cfg_map.values() if isinstance(p, SaveProcessorConfig)), None)


def _check_key(key: str, processor: ProcessorConfig) -> None:
    if key not in _PROCESSORS:
        raise ValueError(f"no processor is called '{key}': try {suggestion(key, _PROCESSORS)}")
    if key != processor.key:
        raise ValueError(f"'{key}' holds a {type(processor).__name__}, which belongs under '{processor.key}'")
