"""What a session finds out about itself before it changes anything: is the model float, does the separator fit."""

from __future__ import annotations

from torch import nn

from quant_core.deployed import DeployedLinear, separator
from quant_core.errors import ConfigurationError
from quant_core.linear import CalibratedLinear
from quant_core.session_config import SchemeConfig, W8A8TimeStepProcessorConfig


def check_float(model: nn.Module) -> None:
    """Check that no layer is quantized yet. Raises ConfigurationError naming the first that is."""
    quantized = [name for name, m in model.named_modules() if isinstance(m, (CalibratedLinear, DeployedLinear))]
    if quantized:
        raise ConfigurationError(
            "the model is quantized already",
            where=f"{type(model).__name__}: {len(quantized)} layers, first {quantized[0]}",
            why="a model is quantized in place, and codes of codes mean nothing",
            advice="load the float model again",
        )


def first_static_step(scheme: SchemeConfig, timesteps: int) -> int | None:
    """Return the first static step of a per-step scheme with so many steps, or None for other schemes.

    Raises ConfigurationError when it lies beyond the last step.
    """
    if not isinstance(scheme, W8A8TimeStepProcessorConfig):
        return None
    first = separator(scheme.timestep_sep, timesteps)
    if first > timesteps:
        raise ConfigurationError(
            f"timestep_sep {first} lies beyond the last of {timesteps} steps",
            where="timestep_sep, calib_data",
            why="steps below it run dynamic and the others static, so it is at most the number of steps",
            advice=f"{timesteps // 2} (half the steps), or leave it out",
        )
    return first
