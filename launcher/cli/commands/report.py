"""`report`: tell of a published checkpoint what a person wants to know, in one page."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch
from model_adapters.options import UserPath


class ReportOptions(Section):
    """Write report.html, which needs no other file, report.md and report.json."""

    folder: Annotated[UserPath, POSITIONAL] = Field(description="folder of the quantized weights of a finished job")
    output: UserPath | None = Field(default=None, description="folder to write into; left out: the same")


def options(name: str) -> type[ReportOptions]:
    """Return the options of the command."""
    return ReportOptions


def run(options: ReportOptions, launch: Launch | None) -> None:
    """Read what the job left, and write the report."""
    use_only("cpu")
    from launcher.report.content import gather
    from launcher.report.pages import write_report

    for path in write_report(gather(options.folder), options.folder, options.output or options.folder):
        print(path)
