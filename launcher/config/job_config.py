"""Describe a whole run in one tree of options: the command line, YAML and Python all produce it.

    model          which adapter
    pipeline       the model's own options: its folder, prompts, image size, steps, seed
    quantization   what to quantize and how
    ranks          devices and how the ranks are laid out
    output         what is written where, and what a second run may reuse

A model changes defaults but never the shape of the tree: `job_config_class("flux")` is `JobConfig` with the adapter's
pipeline options in place and the adapter's `DEFAULTS` as the defaults of the fields they name.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model, model_validator

from launcher.config.config_errors import Origin, explain, together
from launcher.config.job_rules import RULES
from model_adapters import load_options
from model_adapters.options import PipelineOptions
from quant_core.errors import ConfigurationError
from quant_core.schemes import QUANT_TYPES, SCHEMES
from quant_core.schemes.option_rules import schemes_that
from quant_core.schemes.scheme import ActMethod

if TYPE_CHECKING:
    QuantType = str
else:
    QuantType = Literal[tuple(QUANT_TYPES)]
_SUMMARIES = "; ".join(f"{name}: {scheme.summary}" for name, scheme in SCHEMES.items())
# The unit interval: the exponents of the smoothing formulas.
Exponent = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Refuse unknown keys and later changes: the configuration that is stored is the one that ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantization(Section):
    """What is quantized, and how."""

    do_quant: bool = Field(default=False, description="calibrate, quantize and publish the transformer")
    quant_type: QuantType = Field(default="w8a8", description=f"scheme ({_SUMMARIES}; _fa3: with scales for attention)")
    anti_method: Literal["m3", "m4", "m6"] | None = Field(
        default=None, description="outlier suppression before quantizing; left out: none"
    )
    anti_alpha: Exponent | None = Field(
        default=None, description="exponent of the activations in m4 and m6; left out: the method's own, or its search"
    )
    anti_beta: Exponent | None = Field(default=None, description="exponent of the weights in m6; left out: searched")
    anti_groups: Literal["default", "all"] = Field(
        default="default", description="layers to smooth: the model's usual ones, or its optional ones too"
    )
    anti_fused: bool = Field(
        default=False, description="fold smoothing into the layers in front, so that nothing is multiplied at run time"
    )
    act_method: ActMethod = Field(default="minmax", description="estimator of static activation ranges")
    numerics: Literal["float32", "reference"] = Field(
        default="float32", description="arithmetic: the better one, or bit-equal to the reference tool"
    )
    disable_names: tuple[str, ...] | None = Field(
        default=None,
        description="layers kept float, by name or pattern; without a value: none; left out: the model's recipe",
    )
    timestep_sep: int | None = Field(
        default=None,
        ge=0,
        description=f"{schemes_that(lambda scheme: scheme.per_step)}: steps below it run dynamic, the others static; "
        "left out: half the steps",
    )
    scale_sync: Literal["local", "global"] = Field(
        default="local",
        description="scales of row-split layers: of each shard, or equal over the tensor-parallel group",
    )


class RankOptions(Section):
    """Devices, and how the ranks are laid out."""

    device: Literal["npu", "cuda", "cpu"] = Field(default="npu", description="kind of device")
    device_id: int = Field(
        default=0, ge=0, description="device of a single process; under torchrun the local rank picks it"
    )
    tp_size: int | None = Field(
        default=None,
        ge=1,
        description="ranks that share one copy of the model; left out: what the device type or world says",
    )
    layout: str | None = Field(default=None, description="shard plan by name; left out: the model's first")
    # Half an hour: longer than the slowest rank-local work between two waits (one prompt, one shard), shorter than
    # a night lost to a dead peer.
    timeout_s: int = Field(default=1800, ge=1, description="seconds after which a wait for another rank is an error")
    # Two minutes: writing a shard of 12 GB through a library that holds the interpreter's lock stays below it.
    hang_timeout: int = Field(
        default=120, ge=1, description="seconds without a sign of life after which a rank is taken for hung"
    )


class Output(Section):
    """What is written where, and what a second run may reuse."""

    save_path: Path = Field(default=Path("./results"), description="folder of the images, with --do_save_img")
    do_save_img: bool = Field(default=False, description="save images: of the float model, and with --do_quant of both")
    quant_weight_save_folder: Path | None = Field(default=None, description="folder of the quantized weights")
    quant_dump_calib_folder: Path | None = Field(default=None, description="folder of the calibration data")
    calibrate: Literal["always", "needed"] = Field(
        default="always", description="dump calibration data always, or only if the scheme reads activations"
    )
    resume: Literal["auto", "never"] = Field(
        default="auto", description="reuse what an earlier run of the same job finished"
    )
    fingerprint: Literal["content", "stat"] = Field(
        default="content",
        description="know the model by the content of its weights, or faster by their sizes and times",
    )
    overwrite: bool = Field(default=False, description="replace an already published result of another job")


class JobConfig(Section):
    """Describe one run completely. Build it with `job_config`, `JobConfig.from_yaml` or the command line."""

    model: str
    pipeline: SerializeAsAny[PipelineOptions]
    quantization: Quantization = Quantization()
    ranks: RankOptions = RankOptions()
    output: Output = Output()

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> JobConfig:
        if problems := [problem for rule in RULES for problem in rule(self)]:
            raise together(problems)
        return self

    def to_yaml(self) -> str:
        """Return the resolved configuration as commented YAML, which `--config` accepts."""
        return "".join(_yaml_lines(self, indent=""))

    @staticmethod
    def from_yaml(text: str) -> JobConfig:
        """Build a configuration from YAML text that names its model.

        Raises:
            ConfigurationError: the text is no YAML mapping, or its options are wrong.
        """
        tree = parse_yaml(text)
        return job_config(str(tree.get("model", "")), tree)


def job_config(model: str, tree: Mapping[str, Any], origin: Origin | None = None) -> JobConfig:
    """Build the configuration of a job of `model` from a tree of options, filling in the defaults.

    Raises:
        ConfigurationError: naming every wrong option, `origin` saying where each came from.
    """
    options = job_config_class(model)
    try:
        return options.model_validate({"pipeline": {}, **tree, "model": model})
    except ValidationError as error:
        raise explain(error, options, origin) from None


@cache
def job_config_class(model: str) -> type[JobConfig]:
    """Return `JobConfig` with the pipeline options and defaults of one adapter.

    Raises:
        ConfigurationError: no adapter has that name.
    """
    adapter = load_options(model)
    fields: dict[str, Any] = {"model": (str, model), "pipeline": (adapter.OPTIONS, ...)}
    for name, section in (("quantization", Quantization), ("ranks", RankOptions), ("output", Output)):
        of_model = _with_defaults(section, adapter.DEFAULTS)
        fields[name] = (of_model, Field(default_factory=of_model))
    return create_model("JobConfig", __base__=JobConfig, **fields)


def _with_defaults(section: type[Section], defaults: Mapping[str, object]) -> type[Section]:
    changed: dict[str, Any] = {
        name: (field.rebuild_annotation(), Field(defaults[name], validate_default=True, description=field.description))
        for name, field in section.model_fields.items()
        if name in defaults
    }
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **changed)


def parse_yaml(text: str, *, where: str = "--config") -> dict[str, Any]:
    """Read YAML text as a tree of options; the empty text is the empty tree, and an empty section is left out.

    Raises:
        ConfigurationError: it is not YAML, or no mapping.
    """
    import yaml  # here, because --help does not need it and must be quick

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            "the configuration is not YAML", where=where, why=" ".join(str(error).split()), advice="correct that line"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"the configuration is a {type(tree).__name__}, not a mapping",
            where=where,
            why="it holds the sections model, pipeline, quantization, ranks, output",
            advice="start from the configuration that a run stores beside its output",
        )
    return {str(key): value for key, value in tree.items() if value is not None}


def _yaml_lines(section: BaseModel, indent: str) -> Iterator[str]:
    import yaml

    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:\n"
            yield from _yaml_lines(value, indent + "  ")
            continue
        if field.description:
            yield f"{indent}# {field.description}\n"
        yield textwrap.indent(yaml.safe_dump({name: plain[name]}, allow_unicode=True), indent)
