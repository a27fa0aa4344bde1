"""Describe a whole run in one tree of options: the command line, YAML and Python all produce it.

    model          which adapter
    pipeline       the model's own options: its folder, prompts, image size, steps, seed
    quantization   what to quantize and how
    ranks          devices and how the ranks are laid out
    output         what is written where, and what a second run may reuse
    evaluation     what is measured of the published checkpoint, and what it must reach

Nothing here depends on a model or checks one option against another: see `resolve` and `job_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, SerializeAsAny, model_validator

from launcher.config.budget import BudgetWords, SchemeCosts
from launcher.config.layer_schemes import LayerSchemes, require_options_of_files
from launcher.config.stored_job import STARTED_IN
from launcher.config.yaml_text import commented_yaml
from model_adapters.options import PipelineOptions, UserPath
from model_adapters.quality.gate import Thresholds
from quant_core.processor import Exponent
from quant_core.schemes import QUANT_TYPES, SCHEMES
from quant_core.schemes.option_rules import schemes_that
from quant_core.schemes.scheme import ActMethod, Scheme
from quant_core.schemes.treatment import Treatment

AUTO = "auto"
# What a checkpoint is called whose layers have schemes of their own: the loader knows no name for a mix.
_MIX = "w8a8"
# The outlier suppression that `auto` tries on each layer when none was asked for.
_TRIED = "m4"

if TYPE_CHECKING:
    QuantType = str
else:
    QuantType = Literal[(*QUANT_TYPES, AUTO)]
_SUMMARIES = "; ".join(f"{name}: {scheme.summary}" for name, scheme in SCHEMES.items())


class Section(BaseModel):
    """Refuse unknown keys and later changes: the configuration that is stored is the one that ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantization(Section):
    """What is quantized, and how."""

    do_quant: bool = Field(default=False, description="calibrate, quantize and publish the transformer")
    quant_type: QuantType = Field(
        default="w8a8",
        description=f"scheme ({_SUMMARIES}; _fa3: with scales for attention; auto: for each layer the one it needs)",
    )
    anti_method: Literal["m3", "m4", "m6"] | None = Field(
        default=None, description="outlier suppression before quantizing; left out: none"
    )
    anti_alpha: Exponent | None = Field(
        default=None, description="exponent of the activations in m4 and m6; left out: the method's own, or its search"
    )
    anti_beta: Exponent | None = Field(default=None, description="exponent of the weights in m6; left out: searched")
    anti_groups: Literal["default", "all", "every"] = Field(
        default="default",
        description="layers to smooth: the model's usual ones (all, where these stay float), its optional ones too "
        "(all), or every layer by itself",
    )
    anti_fused: bool = Field(
        default=False, description="fold smoothing into the layers in front, so that nothing is multiplied at run time"
    )
    rotate_values: bool = Field(
        default=False,
        description="rotate the values inside each attention head, which spreads outliers; costs nothing at run time",
    )
    act_method: ActMethod = Field(default="minmax", description="estimator of static activation ranges")
    numerics: Literal["float32", "reference"] = Field(
        default="float32", description="arithmetic: the better one, or bit-equal to the reference tool"
    )
    disable_names: tuple[str, ...] | None = Field(
        default=None,
        description="layers kept float, by name or pattern; without a value: none; left out: the model's recipe",
    )
    layer_schemes: LayerSchemes = Field(
        default_factory=dict,
        description="layers with another scheme, or float: PATTERN=SCHEME, or @FILE with a map; the first match wins, "
        "over --disable_names too; :plain behind a scheme: without outlier suppression",
    )
    budget: BudgetWords = Field(
        default=("balanced",),
        description="auto: what accuracy may cost, speed, balanced or quality, or numbers: dynamic=SHARE of the work "
        "that is not static, cost=MEAN, bytes=N, sqnr=DB of the output that is enough",
    )
    scheme_costs: SchemeCosts = Field(
        default_factory=dict,
        description="auto: SCHEME=X, how long layers of a scheme take on your card, where others are 1 (static), "
        "1.15 (dynamic), 2 (w8a16) and 2.2 (float)",
    )
    timestep_sep: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(
        default=None,
        description=f"{schemes_that(lambda scheme: scheme.per_step)}: steps below it run dynamic, the others static; "
        "left out: half the steps; auto: the least that costs no quality, by measurement",
    )
    scale_sync: Literal["local", "global"] = Field(
        default="local",
        description="scales of row-split layers: of each shard, or equal over the tensor-parallel group",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _holds_with_its_files(cls, given: Any, check: ModelWrapValidatorHandler[Quantization]) -> Quantization:
        options = check(given)
        if isinstance(given, Mapping) and not options.is_auto:  # which measures with options of its own
            require_options_of_files(given.get("layer_schemes"), options)
        return options

    @property
    def is_auto(self) -> bool:
        """Whether measurements choose a scheme for each layer."""
        return self.quant_type == AUTO

    @property
    def main_type(self) -> str:
        """Return the type of all layers that nothing else is said of; the checkpoint is called after its scheme."""
        return _MIX if self.is_auto else self.quant_type

    @property
    def smoothing_method(self) -> str | None:
        """Return the outlier suppression that is used, or tried."""
        return self.anti_method or (_TRIED if self.is_auto else None)

    @property
    def schemes(self) -> list[Scheme]:
        """Return the schemes that layers may get, that of the quantization type first."""
        named = [Treatment.of(value).scheme for value in self.layer_schemes.values()]
        others = SCHEMES.values() if self.is_auto else (SCHEMES[name] for name in named if name in SCHEMES)
        return [QUANT_TYPES[self.main_type].scheme, *others]


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

    save_path: UserPath = Field(default=Path("./results"), description="folder of the images, with --do_save_img")
    do_save_img: bool = Field(default=False, description="save images: of the float model, and with --do_quant of both")
    quant_weight_save_folder: UserPath | None = Field(default=None, description="folder of the quantized weights")
    quant_dump_calib_folder: UserPath | None = Field(default=None, description="folder of the calibration data")
    calibrate: Literal["always", "needed", "online"] = Field(
        default="always",
        description="dump calibration data always, or only if the scheme reads activations; online: take ranges while "
        "dumping, so that quantizing replays nothing",
    )
    no_dump: bool = Field(default=False, description="write no calibration data, where nothing would replay it")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="reuse what an earlier run of the same job finished, or make it anew"
    )
    fingerprint: Literal["content", "stat"] = Field(
        default="content",
        description="know the model by the content of its weights, or faster by their sizes and times",
    )
    overwrite: bool = Field(default=False, description="replace the checkpoint and the calibration data of another job")
    dry_run: bool = Field(default=False, description="only say what would be done, and all that keeps it from starting")


class Evaluation(Section, Thresholds):
    """What is measured of the published checkpoint, and what it must reach."""

    evaluate: int | None = Field(
        default=None,
        ge=0,
        description="measure the published checkpoint on this many new pictures; 0: layers and outputs only, on the "
        "calibration data; left out: not at all",
    )
    evaluate_prompts: UserPath | None = Field(
        default=None,
        description="prompts to evaluate, in the format of the prompt file; left out: those of the prompt file that "
        "calibration did not use, then the others with other noise",
    )


class JobConfig(Section):
    """Describe one run completely. Build it with `resolve.job_config` or the command line, which check it."""

    model: str
    pipeline: SerializeAsAny[PipelineOptions]
    quantization: Quantization = Quantization()
    ranks: RankOptions = RankOptions()
    output: Output = Output()
    evaluation: Evaluation = Evaluation()

    def to_yaml(self) -> str:
        """Return the resolved configuration as commented YAML, which `--config` accepts, and where it was started."""
        try:
            started_in = f"{STARTED_IN}: {json.dumps(str(Path.cwd()))}\n"
        except OSError:  # the current folder is gone
            started_in = ""
        return commented_yaml(self) + started_in
