"""`verify`: check a published checkpoint by every rule, and say what the runtime will make of it."""

from __future__ import annotations

import json

from pydantic import AliasChoices, Field

from launcher.cli.commands.shared_options import AsJson, WeightsFolder
from launcher.config.job_config import Section
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch
from model_adapters.options import UserPathText


class VerifyOptions(Section):
    """Check the files of all ranks, each by itself and against each other; nothing is changed."""

    folder: WeightsFolder
    path: UserPathText | None = Field(
        default=None, description="folder of the float pipeline: compare every weight with it, layer by layer"
    )
    with_runtime: bool = Field(
        default=False,
        description="load the files with the installed MindIE-SD and compare what its layers compute",
        validation_alias=AliasChoices("runtime", "with_runtime"),
    )
    as_json: AsJson = False


def options(name: str) -> type[VerifyOptions]:
    """Return the options of the command."""
    return VerifyOptions


def run(options: VerifyOptions, launch: Launch | None) -> None:
    """Check in this process, without a device; raises VerificationError when anything is wrong."""
    use_only("cpu")
    from launcher.inspection.verify import told, verify
    from launcher.journal.logs import quiet_libraries

    quiet_libraries()
    verdict = verify(options.folder, options.path, with_runtime=options.with_runtime)
    print(json.dumps(verdict.as_plain(), indent=1) if options.as_json else "\n".join(told(verdict)))
    verdict.require_sound()
