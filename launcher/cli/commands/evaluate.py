"""`evaluate`: measure a checkpoint that is published already, on the ranks that its layout asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from launcher.cli.commands.job import under_monitor
from launcher.config.job_config import Evaluation, JobConfig
from launcher.config.option_flags import POSITIONAL
from launcher.config.resolve import job_config
from launcher.config.yaml_text import parse_yaml
from launcher.devices.launch import Launch
from quant_core.checkpoint.json_file import read_object
from quant_core.errors import InputError

if TYPE_CHECKING:
    from launcher.failure.monitor import Monitor

# Beside the checkpoint; their names are the run folder's, which imports torch.
_JOB, _MANIFEST = "quant_job.yaml", "quant_manifest.json"


class EvaluateOptions(Evaluation):
    """Measure a published checkpoint against its float model; what is not given is as in the job that made it."""

    folder: Annotated[Path, POSITIONAL] = Field(description="folder of the published checkpoint")
    path: str | None = Field(default=None, description="folder of the float pipeline")
    prompt_path: str | None = Field(default=None, description="file with the prompts that were calibrated")
    device: Literal["npu", "cuda", "cpu"] | None = Field(default=None, description="kind of device")
    evaluate: int | None = Field(
        default=4, ge=0, description="number of pictures; 0: layers and outputs only, on the calibration data"
    )


def options(name: str) -> type[EvaluateOptions]:
    """Return the options of the command."""
    return EvaluateOptions


def job(options: EvaluateOptions) -> JobConfig:
    """Return the job that made the checkpoint, asked to evaluate it. Raises InputError where the folder holds none."""
    tree = _made_by(options.folder / _JOB)
    manifest = read_object(options.folder / _MANIFEST)
    changes: dict[str, dict[str, Any]] = {
        "pipeline": {"path": options.path, "prompt_path": options.prompt_path},
        "ranks": {"device": options.device, "tp_size": manifest.get("tp_size"), "layout": manifest.get("layout")},
        "output": {"quant_weight_save_folder": options.folder},
    }
    for section, values in changes.items():
        tree[section] = {**(tree.get(section) or {}), **{name: v for name, v in values.items() if v is not None}}
    tree["evaluation"] = {name: getattr(options, name) for name in Evaluation.model_fields}
    return job_config(str(tree.get("model", "")), tree)


def run(options: EvaluateOptions, launch: Launch | None) -> None:
    """Evaluate under a monitor; returns only when it is done."""
    config = job(options)

    def work(monitor: Monitor) -> None:
        from launcher.run import evaluate_published

        evaluate_published(config, monitor)

    under_monitor(config, launch, work)


def _made_by(path: Path) -> dict[str, Any]:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the job that made the checkpoint is not known",
            where=str(path),
            why=str(error),
            advice="give the folder that a job published into (--quant_weight_save_folder)",
        ) from None
