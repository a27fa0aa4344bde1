"""`diff`: compare two published checkpoints."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from launcher.cli.commands.shared_options import AsJson
from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch
from model_adapters.options import UserPath


class DiffOptions(Section):
    """Compare options, layers, tensors and weights; nothing is changed, and a difference is no error."""

    one: Annotated[UserPath, POSITIONAL] = Field(description="folder of quantized weights, A")
    other: Annotated[UserPath, POSITIONAL] = Field(description="folder of quantized weights, B")
    as_json: AsJson = False


def options(name: str) -> type[DiffOptions]:
    """Return the options of the command."""
    return DiffOptions


def run(options: DiffOptions, launch: Launch | None) -> None:
    """Compare in this process, without a device."""
    use_only("cpu")
    from launcher.inspection.difference import difference, told
    from launcher.journal.logs import quiet_libraries

    quiet_libraries()
    found = difference(options.one, options.other)
    lines = told(found, options.one, options.other)
    print(json.dumps(found.as_plain(), indent=1) if options.as_json else "\n".join(lines))
