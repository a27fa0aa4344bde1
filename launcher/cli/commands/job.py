"""A job (`flux`, `sd3`, ...): calibrate, quantize and publish a model, or make images with it, on one or many ranks."""

from __future__ import annotations

from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_config_class
from launcher.devices import npu


def options(name: str) -> type[JobConfig]:
    """Return the configuration of the model that the command is called after."""
    return job_config_class(name)


def run(options: JobConfig) -> None:
    """Run a job under watch; returns only when it is done."""
    if options.ranks.device == "npu":
        npu.load()  # not later: the thread that watches asks torch for its accelerator, and half of one ends the run
    else:
        npu.hide()
    from launcher.journal.logs import quiet_libraries
    from model_adapters.weights.offline import stay_offline

    stay_offline(options.pipeline.path)
    quiet_libraries()
    from launcher.failure.watch import Watch

    watch = Watch(options)
    watch.start()
    try:
        from launcher.run import run as run_job  # takes seconds, under watch

        run_job(options, watch)
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)
