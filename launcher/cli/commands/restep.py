"""`restep`: rows for another number of steps, or another shift, of a checkpoint that has a row for each step."""

from __future__ import annotations

from pydantic import Field

from launcher.cli.commands.shared_options import WeightsFolder
from launcher.config.job_config import Section
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch
from model_adapters.options import UserPath


class RestepOptions(Section):
    """Write a copy of a published checkpoint that serves another number of denoising steps."""

    folder: WeightsFolder
    infer_steps: int = Field(ge=1, description="denoising steps that the copy is for")
    shift: float | None = Field(default=None, gt=0, description="shift of the scheduler; left out: as calibrated")
    to: UserPath | None = Field(default=None, description="folder of the copy; left out: FOLDER_<steps>steps beside it")


def options(name: str) -> type[RestepOptions]:
    """Return the options of the command."""
    return RestepOptions


def run(options: RestepOptions, launch: Launch | None) -> None:
    """Compute the rows and publish, in this process, without a device."""
    use_only("cpu")
    from launcher.journal.logs import quiet_diffusers, quiet_libraries
    from launcher.stages.restep import restep_files

    quiet_libraries()
    quiet_diffusers()
    restep_files(options.folder, options.infer_steps, shift=options.shift, to=options.to)
