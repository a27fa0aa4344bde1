"""A job, called after its model: calibrate, quantize and publish it, or make what it generates, on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.cli.commands.plan import show
from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_config_class
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch

if TYPE_CHECKING:
    from launcher.failure.monitor import Monitor


def options(name: str) -> type[JobConfig]:
    """Return the configuration of the model that the command is called after."""
    return job_config_class(name)


def job(options: JobConfig) -> JobConfig:
    """Return what the ranks are to run."""
    return options


def run(options: JobConfig, launch: Launch | None) -> None:
    """Run a job under a monitor, or only plan it; returns only when it is done."""
    if options.output.dry_run:
        if launch is None or launch.rank == 0:
            show(options, launch.world if launch and launch.is_distributed else None)
        return

    def work(monitor: Monitor) -> None:
        from launcher.run import run as run_job  # takes seconds, under the monitor

        run_job(options, monitor)

    under_monitor(options, launch, work)


def under_monitor(config: JobConfig, launch: Launch | None, work: Callable[[Monitor], object]) -> None:
    """Do this rank's part of a job under a started monitor, which ends the process if it fails."""
    # Not later: the monitor asks torch for its accelerator, which must have been loaded by then, in one piece.
    use_only(config.ranks.device)
    if not config.pipeline.lora:
        # Where it is installed, diffusers imports it, for half a second, and needs it for LoRA files only.
        sys.modules.setdefault("peft", None)  # pyright: ignore[reportArgumentType, reportCallIssue]
    from launcher.journal.logs import quiet_libraries
    from launcher.journal.terminal import wait_for_no_reader
    from model_adapters.weights.offline import stay_offline

    wait_for_no_reader()
    stay_offline(config.pipeline.path)
    quiet_libraries()
    from launcher.failure.monitor import Monitor

    monitor = Monitor(config, launch)
    monitor.start()
    try:
        work(monitor)
    except (Exception, KeyboardInterrupt) as error:
        monitor.fail(error)
