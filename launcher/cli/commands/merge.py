"""`merge`: publish the shards that an earlier run left staged in a folder."""

from __future__ import annotations

from pydantic import Field

from launcher.cli.commands.shared_options import WeightsFolder
from launcher.config.job_config import QuantType, Section
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch


class MergeOptions(Section):
    """Check the shards that all ranks wrote against each other and publish them again."""

    folder: WeightsFolder
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
