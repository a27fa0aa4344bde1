"""`merge`: publish the shards that an earlier run left staged in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from launcher.config.job_config import QuantType, Section
from launcher.config.option_flags import POSITIONAL
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch


class MergeOptions(Section):
    """Check the shards that all ranks wrote against each other and publish them again."""

    folder: Annotated[Path, POSITIONAL] = Field(
        description="folder of the quantized weights",
        validation_alias=AliasChoices("quant_weight_save_folder", "folder"),
    )
    quant_type: QuantType | None = Field(
        default=None, description="scheme of the shards; left out: the only one in the folder"
    )


def options(name: str) -> type[MergeOptions]:
    """Return the options of the command."""
    return MergeOptions


def run(options: MergeOptions, launch: Launch | None) -> None:
    """Check and publish, in this process, without a device."""
    use_only("cpu")
    from launcher.stages.merge import merge_files

    merge_files(options.folder, options.quant_type)
