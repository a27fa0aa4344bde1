"""`doctor`: look at this machine, and say what would stand in a job's way and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.launch import Launch


class DoctorOptions(Section):
    """Look at packages, devices, memory, disks, left-over processes, limits and variables."""

    folder: Annotated[Path, POSITIONAL] = Field(
        default=Path("."), description="folder of a job, whose disk and account are looked at"
    )
    ranks: int | None = Field(default=None, ge=1, description="start so many ranks and try a collective between them")
    device: Literal["npu", "cuda", "cpu"] | None = Field(
        default=None, description="kind of device to try it on; left out: the first that has cards, else cpu"
    )
    as_json: bool = Field(
        default=False, validation_alias=AliasChoices("json", "as_json"), description="print JSON, for programs"
    )


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
