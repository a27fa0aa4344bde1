"""`doctor`: look at this machine, and say what would stand in a job's way and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.cli.commands.shared_options import AsJson
from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.launch import Launch
from model_adapters.options import UserPath
from quant_core.errors import ConfigurationError


class DoctorOptions(Section):
    """Look at packages, devices, memory, disks, left-over processes, limits and variables."""

    folder: Annotated[UserPath, POSITIONAL] = Field(
        default=Path("."), description="folder of a job, whose disk and account are looked at"
    )
    ranks: int | None = Field(default=None, ge=1, description="start so many ranks and try a collective between them")
    device: Literal["npu", "cuda", "cpu"] | None = Field(
        default=None, description="kind of device to try it on; left out: the first that has cards, else cpu"
    )
    as_json: AsJson = False

    @model_validator(mode="after")
    def _a_device_is_tried_by_ranks(self) -> DoctorOptions:
        if self.device and self.ranks is None:
            raise ConfigurationError(
                f"--device {self.device} has no meaning without --ranks",
                where="--device, --ranks",
                why="it is the kind of device that the ranks are tried on; devices of all kinds are looked at anyway",
                advice="add --ranks 2, or drop --device",
            )
        return self


def options(name: str) -> type[DoctorOptions]:
    """Return the options of the command."""
    return DoctorOptions


def run(options: DoctorOptions, launch: Launch | None) -> None:
    """Print what was found; ends with the status of an unfit environment if there is anything to fix."""
    from launcher.doctor.checks import Asked, examine
    from launcher.doctor.finding import as_json, as_text

    findings = list(examine(Asked(options.folder, options.ranks, options.device)))
    print((as_json if options.as_json else as_text)(findings))
    if any(finding.mark == "!!" for finding in findings):
        from launcher.failure.exit_codes import ExitCode

        raise SystemExit(ExitCode.ENVIRONMENT)
