"""`evaluate`: measure a checkpoint that is published already, on the ranks that its layout asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from launcher.cli.commands.job import under_monitor
from launcher.config.job_config import Evaluation, JobConfig
from launcher.config.option_flags import POSITIONAL
from launcher.config.resolve import job_config
from launcher.config.stored_job import read_stored, with_its_paths
from launcher.devices.launch import Launch
from model_adapters.options import UserPath, UserPathText
from model_adapters.quality.gate import OF_PICTURES
from quant_core.checkpoint.json_file import read_object
from quant_core.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from launcher.failure.monitor import Monitor

# Beside the checkpoint; their names are the run folder's, which imports torch.
_JOB, _MANIFEST = "quant_job.yaml", "quant_manifest.json"
# How many pictures are made where neither the command nor the job says it.
_PICTURES = 4


class EvaluateOptions(Evaluation):
    """Measure a published checkpoint against its float model; what is not given is as in the job that made it."""

    folder: Annotated[UserPath, POSITIONAL] = Field(description="folder of the published checkpoint")
    path: UserPathText | None = Field(default=None, description="folder of the float pipeline")
    prompt_path: UserPathText | None = Field(default=None, description="file with the prompts that were calibrated")
    device: Literal["npu", "cuda", "cpu"] | None = Field(default=None, description="kind of device")
    evaluate: int | None = Field(
        default=None,
        ge=0,
        description="number of pictures; 0: layers and outputs only, on the calibration data; left out: as in the job, "
        f"or {_PICTURES}",
    )


def options(name: str) -> type[EvaluateOptions]:
    """Return the options of the command."""
    return EvaluateOptions


def job(options: EvaluateOptions) -> JobConfig:
    """Return the job that made the checkpoint, asked to evaluate it.

    Raises InputError where the folder holds none, and for one whose steps are not those that the pipeline would run;
    ConfigurationError for options that do not fit that job.
    """
    tree = _made_by(options.folder / _JOB)
    manifest = _published(options.folder / _MANIFEST)
    _require_own_schedule(manifest, options.folder / _MANIFEST)
    of_job = tree.get("ranks") or {}
    # The job's card counts those of its own kind.
    device_id = 0 if options.device not in (None, of_job.get("device")) else None
    changes: dict[str, dict[str, Any]] = {
        "pipeline": {"path": options.path, "prompt_path": options.prompt_path},
        "ranks": {
            **{"device": options.device, "device_id": device_id},
            **{"tp_size": manifest.get("tp_size"), "layout": manifest.get("layout")},
        },
        # What that job was to ignore of earlier runs is no word on this one, which makes none of its images.
        "output": {"quant_weight_save_folder": options.folder, "resume": "auto", "do_save_img": False},
    }
    for section, values in changes.items():
        tree[section] = {**(tree.get(section) or {}), **{name: v for name, v in values.items() if v is not None}}
    tree["evaluation"] = _evaluation(tree.get("evaluation") or {}, options)
    config = job_config(str(tree.get("model", "")), tree)
    _require_what_is_compared(config, options.folder / _JOB)
    return config


def _evaluation(of_job: dict[str, Any], options: EvaluateOptions) -> dict[str, Any]:
    """Return what to measure: what was given, else what the job asked for, but nothing of pictures where none are."""
    given = options.model_dump(include=set(Evaluation.model_fields), exclude_unset=True)
    asked = {**of_job, **given}
    if asked.get("evaluate") is None:
        asked["evaluate"] = _PICTURES
    without = OF_PICTURES | {"evaluate_prompts"} if asked["evaluate"] == 0 else set()
    return {name: value for name, value in asked.items() if name in given or name not in without}


def run(options: EvaluateOptions, launch: Launch | None) -> None:
    """Evaluate under a monitor; returns only when it is done."""
    config = job(options)

    def work(monitor: Monitor) -> None:
        from launcher.run import evaluate_published

        evaluate_published(config, monitor)

    under_monitor(config, launch, work)


def _made_by(path: Path) -> dict[str, Any]:
    try:
        return with_its_paths(read_stored(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the job that made the checkpoint is not known",
            where=str(path),
            why=getattr(error, "strerror", None) or str(error),
            advice="give the folder that a job published into (--quant_weight_save_folder)",
        ) from None


def _published(path: Path) -> dict[str, Any]:
    if path.exists():
        return read_object(path)
    raise InputError(
        "no checkpoint is published here",
        where=str(path),
        why="the manifest is missing, which is written last",
        advice="run the job, or publish its shards: python -m launcher merge FOLDER",
    )


def _require_own_schedule(manifest: dict[str, Any], path: Path) -> None:
    shift = manifest.get("fields", {}).get("restep.shift")
    if shift is not None:
        raise InputError(
            f"the checkpoint's rows are for a schedule of shift {shift}",
            where=str(path),
            why="`restep --shift` made them, and the pipeline that would be measured runs its own schedule",
            advice="evaluate the checkpoint that it was copied from, or a copy made without --shift",
        )


def _require_what_is_compared(config: JobConfig, path: Path) -> None:
    if config.evaluation.evaluate == 0 and config.output.no_dump:
        raise ConfigurationError(
            "--evaluate 0 finds no calibration data to compare layers and outputs on",
            where=f"--evaluate, {path}",
            why="the job ran with --no_dump, which keeps none",
            advice=f"--evaluate {_PICTURES} ({_PICTURES} pictures)",
        )
