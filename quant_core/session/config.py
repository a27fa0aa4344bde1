"""What to do to a model, as validated data: the configuration of `quant_model`.

The names are those of the field's tools: a `SessionConfig` holds a map of processors (one scheme, at most one outlier
suppression, FA3, save), the calibration data and the device. The order of the map does not matter. Everything that
would be silently ignored or contradict itself is refused here, before a model is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from quant_core.errors import ConfigurationError, nearest

# The numbers that this family of tools has for the same estimators, in Python and on a command line.
_METHOD_NUMBERS = {1: "minmax", 2: "histogram", 3: "mix", "1": "minmax", "2": "histogram", "3": "mix"}
ActMethod = Annotated[
    Literal["minmax", "histogram", "mix", "percentile", "mse"],
    BeforeValidator(lambda value: _METHOD_NUMBERS.get(value, value) if isinstance(value, (int, str)) else value),
]
Exponent = Annotated[float, Field(ge=0.0, le=1.0)]
QuantType = Literal["W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC"]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class W8A8QuantConfig(_Config):
    """Choose how a static scheme finds its activation ranges: `act_method`, by name or 1, 2, 3 (`estimators`)."""

    act_method: ActMethod = "minmax"


class W8A8TimeStepQuantConfig(W8A8QuantConfig):
    """Choose how the per-timestep scheme finds its activation ranges."""


class W8A8DynamicQuantConfig(W8A8QuantConfig):
    """Configure the dynamic scheme, which measures activations at run time."""


class ProcessorConfig(_Config):
    """Configure one step of a session; `key` is its name in the map and `kind` what there may be only one of."""

    key: ClassVar[str]
    kind: ClassVar[str]


class SchemeConfig(ProcessorConfig):
    """Configure a quantization scheme.

    `disable_names`: linear layers to keep float, exact names or patterns.
    """

    kind: ClassVar[str] = "quantization scheme"
    quant_type: ClassVar[QuantType]
    cfg: W8A8QuantConfig = Field(default_factory=W8A8QuantConfig)
    disable_names: Sequence[str] = ()


class W8A8ProcessorConfig(SchemeConfig):
    """Quantize with one static activation range per layer."""

    key: ClassVar[str] = "w8a8"
    quant_type: ClassVar[QuantType] = "W8A8"


class W8A8TimeStepProcessorConfig(SchemeConfig):
    """Quantize with one static activation range per layer and denoising step.

    `timestep_sep`: steps below it are to run dynamic, the others static; half the steps when left out.
    """

    key: ClassVar[str] = "w8a8_timestep"
    quant_type: ClassVar[QuantType] = "W8A8_TIMESTEP"
    timestep_sep: int | None = Field(default=None, ge=0)


class W8A8DynamicProcessorConfig(SchemeConfig):
    """Quantize weights; activations are quantized per token at run time."""

    key: ClassVar[str] = "w8a8_dynamic"
    quant_type: ClassVar[QuantType] = "W8A8_DYNAMIC"


class SmoothingConfig(ProcessorConfig):
    """Configure an outlier suppression.

    `smoothing_groups`: the model's default groups, or its optional ones too. `fused`: let the linears in front absorb
    the factors, so that nothing is multiplied at run time.
    """

    kind: ClassVar[str] = "outlier suppression"
    smoothing_groups: Literal["default", "all"] = "default"
    fused: bool = False


class M3ProcessorConfig(SmoothingConfig):
    """Suppress outliers with a searched power of the mean activation."""

    key: ClassVar[str] = "m3"


class M4ProcessorConfig(SmoothingConfig):
    """Suppress outliers with the balance of activation and weight maxima (SmoothQuant).

    `alpha`: exponent of the activations; the model's own when left out.
    """

    key: ClassVar[str] = "m4"
    alpha: Exponent | None = None


class M6Config(_Config):
    """Exponents of activations and weights; one that is left out is searched."""

    alpha: Exponent | None = None
    beta: Exponent | None = None


class M6ProcessorConfig(SmoothingConfig):
    """Suppress outliers with independent exponents for activations and weights."""

    key: ClassVar[str] = "m6"
    cfg: M6Config = Field(default_factory=M6Config)


class FA3ProcessorConfig(ProcessorConfig):
    """Measure scales for quantized attention."""

    key: ClassVar[str] = "fa3"
    kind: ClassVar[str] = "attention quantization"


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


_KEYS = ["w8a8", "w8a8_timestep", "w8a8_dynamic", "m3", "m4", "m6", "fa3", "save"]


class SessionConfig(_Config):
    """Describe one quantization: processors by name, calibration data, device and numerics.

    calib_data: records as `DumperManager` saves them, or a list of positional argument lists.
    device: where to run ("npu", "cuda", "cpu"); where the model is when left out. dev_id: its index.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    processor_cfg_map: dict[str, SerializeAsAny[ProcessorConfig]]
    calib_data: Any = None
    device: str | None = None
    dev_id: int | None = Field(default=None, ge=0)
    numerics: Literal["float32", "reference"] = "float32"

    @model_validator(mode="after")
    def _processors_fit(self) -> SessionConfig:
        for key, processor in self.processor_cfg_map.items():
            _check_key(key, processor)
        for kind in ("quantization scheme", "outlier suppression"):
            keys = [key for key, processor in self.processor_cfg_map.items() if processor.kind == kind]
            if len(keys) > 1:
                raise ValueError(f"{' and '.join(keys)} are each a {kind}: a session has one, so drop all but one")
        if not any(isinstance(processor, SchemeConfig) for processor in self.processor_cfg_map.values()):
            raise ValueError("no quantization scheme: add one of w8a8, w8a8_timestep, w8a8_dynamic")
        if self.fa3 and self.scheme.quant_type != "W8A8_DYNAMIC":
            raise ConfigurationError(
                f"fa3 goes with w8a8_dynamic only, not with {self.scheme.key}",
                where="processor_cfg_map",
                why="a runtime that quantizes attention quantizes the linear layers around it token by token",
                advice="replace the scheme by w8a8_dynamic, or drop fa3",
            )
        return self

    @model_validator(mode="after")
    def _estimator_is_used(self) -> SessionConfig:
        method = self.scheme.cfg.act_method
        if method != "minmax" and self.numerics == "reference":
            raise ConfigurationError(
                f"act_method '{method}' is no estimator of numerics='reference'",
                where="act_method, numerics",
                why="what the reference tool computes for it is not public; only minmax can be equal to the last bit",
                advice="numerics='float32', or act_method='minmax'",
            )
        if method != "minmax" and self.scheme.quant_type == "W8A8_DYNAMIC":
            raise ConfigurationError(
                f"act_method '{method}' has no meaning for {self.scheme.key}",
                where="act_method",
                why="its runtime measures each token; no activation range is estimated",
                advice="drop act_method, or use w8a8 or w8a8_timestep",
            )
        return self

    @property
    def scheme(self) -> SchemeConfig:
        """Return the one quantization scheme."""
        return next(p for p in self.processor_cfg_map.values() if isinstance(p, SchemeConfig))

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
    if key not in _KEYS:
        close = nearest(key, _KEYS)
        raise ValueError(
            f"unknown processor '{key}'" + (f": did you mean '{close}'?" if close else f"; known: {_KEYS}")
        )
    if key != processor.key:
        raise ValueError(f"'{key}' holds a {type(processor).__name__}, which belongs under '{processor.key}'")
