"""`trace`: turn the logs of a job into a trace in which waiting ranks can be seen."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.launch import Launch
from model_adapters.options import UserPath


class TraceOptions(Section):
    """Write what each rank of a job's last run did when, for ui.perfetto.dev or chrome://tracing."""

    folder: Annotated[UserPath, POSITIONAL] = Field(description="folder of the quantized weights, with the job's logs")
    output: UserPath | None = Field(default=None, description="file to write; left out: logs/trace.json in the folder")


def options(name: str) -> type[TraceOptions]:
    """Return the options of the command."""
    return TraceOptions


def run(options: TraceOptions, launch: Launch | None) -> None:
    """Write the trace, and say where."""
    from launcher.journal.logs import LOGS
    from launcher.journal.trace import trace
    from quant_core.atomic_file import write_text_atomically

    path = write_text_atomically(options.output or options.folder / LOGS / "trace.json", trace(options.folder))
    print(f"{path}: open it in ui.perfetto.dev")
