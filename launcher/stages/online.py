"""Say whether a job can take its ranges while it calibrates, and what else would want the calibration data."""

from __future__ import annotations

from launcher.config.job_config import AUTO, JobConfig
from quant_core.errors import ConfigurationError
from quant_core.session.config import SessionConfig
from quant_core.session.float_forwards import second_look


def reason_to_replay(config: JobConfig, session: SessionConfig) -> str | None:
    """Return why `--calibrate online` has to replay the calibration data all the same, None if it does not."""
    options = config.quantization
    if AUTO in (options.quant_type, options.timestep_sep):
        return "auto measures what it chooses from by replaying"
    return second_look(session)


def takes_ranges(config: JobConfig, session: SessionConfig, *, reads_activations: bool) -> bool:
    """Tell whether the job takes what it needs of activations in the pipeline's own forwards."""
    return config.output.calibrate == "online" and reads_activations and reason_to_replay(config, session) is None


def writes_dump(config: JobConfig, *, reads_activations: bool) -> bool:
    """Tell whether the job writes calibration data."""
    if config.evaluation.evaluate == 0:  # which measures on it
        return True
    return not config.output.no_dump and (reads_activations or config.output.calibrate != "needed")


def needs_prompts(config: JobConfig, *, reads_activations: bool) -> bool:
    """Tell whether the job runs the pipeline on prompts of its own: to calibrate, for images, or to evaluate."""
    evaluation = config.evaluation
    evaluates = evaluation.evaluate is not None and evaluation.evaluate_prompts is None
    paints = config.output.do_save_img or not config.quantization.do_quant
    return paints or evaluates or reads_activations or writes_dump(config, reads_activations=reads_activations)


def runs_pipeline(config: JobConfig, *, reads_activations: bool) -> bool:
    """Tell whether the job runs the pipeline, on prompts of its own or on those of an evaluation."""
    return config.evaluation.evaluate is not None or needs_prompts(config, reads_activations=reads_activations)


def check_online(config: JobConfig, session: SessionConfig, *, reads_activations: bool) -> None:
    """Raise ConfigurationError where no replay can be right, and for `--no_dump` where something is replayed later."""
    online = config.output.calibrate == "online"
    if online and config.quantization.numerics == "reference":
        raise ConfigurationError(
            "--calibrate online has no meaning for --numerics reference",
            where="--calibrate, --numerics",
            why=reason_to_replay(config, session) or "",
            advice="drop --calibrate online, or use --numerics float32",
        )
    if config.output.no_dump and (why := _replayed_later(config, session, reads_activations=reads_activations)):
        raise ConfigurationError(
            "--no_dump leaves nothing to replay, and this job replays",
            where="--no_dump",
            why=why,
            advice="drop --no_dump",
        )


def _replayed_later(config: JobConfig, session: SessionConfig, *, reads_activations: bool) -> str | None:
    if config.evaluation.evaluate == 0:
        return "--evaluate 0 compares layers and outputs on the calibration data"
    if not reads_activations:
        return None
    if config.output.calibrate != "online":
        return f"--calibrate {config.output.calibrate} finds ranges by replaying; --calibrate online does not"
    return reason_to_replay(config, session)
