"""What a session finds out about itself before it changes anything: model, numerics, records, steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from quant_core.calibration.measured import require_kept
from quant_core.errors import ConfigurationError, InputError, few
from quant_core.layers.calibrated import CalibratedLinear
from quant_core.layers.deployed import DeployedLinear
from quant_core.naming import linear_at
from quant_core.parallel.groups import reduce_over
from quant_core.schemes.option_rules import schemes_that
from quant_core.schemes.scheme import PerStepConfig, Scheme, separator
from quant_core.session.float_forwards import require_second_look_is_needless, what_is_kept
from quant_core.session.session import Session


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


def check_outputs(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Check that the runtime can compute every layer. Raises ConfigurationError naming those that it cannot."""
    narrow = [name for name, scheme in schemes.items() if linear_at(model, name).out_features < scheme.least_outputs]
    if narrow:
        raise ConfigurationError(
            f"{schemes[narrow[0]].quant_type} layers with one output: {few(narrow, between=', ', shown=5)}",
            where=f"{type(model).__name__}: {len(narrow)} of {len(schemes)} layers to quantize",
            why="the runtime loads such a layer and fails when it computes: it squeezes the one scale to no axis",
            advice=f"keep them float: disable_names (--disable_names {' '.join(narrow)})",
        )


def check_forwards(model: nn.Module, names: Iterable[str]) -> None:
    """Check that layers multiply as linears do. Raises ConfigurationError naming one that does something else."""
    for name in names:
        if type(linear_at(model, name)).forward is not nn.Linear.forward:
            raise ConfigurationError(
                f"layer '{name}' is a {type(linear_at(model, name)).__name__} with a forward of its own",
                where=type(model).__name__,
                why="a quantized layer computes a linear's product and nothing else, so what it adds would be lost",
                advice=f"make it a plain Linear first, or keep it float: disable_names=['{name}']",
            )


def check_numerics(session: Session) -> None:
    """Check that a running mean is taken over one sequence. Raises ConfigurationError under data parallelism."""
    if session.numerics.is_reference and session.parallel.dp_group is not None:
        raise ConfigurationError(
            "numerics='reference' cannot share records over data-parallel ranks",
            where="numerics",
            why="its running mean is defined over one sequence of records",
            advice="use one data-parallel rank (world = tp_size), or numerics='float32'",
        )


def check_records(session: Session) -> None:
    """Check that a session that needs records or ranges has some, and the steps if it needs them.

    Raises InputError, and ConfigurationError where ranges of the float model's forwards are not enough.
    """
    if session.measured:
        require_second_look_is_needless(session.config)
        require_kept(session.measured, {name: kept.text for name, kept in what_is_kept(session).items()})
    if not session.observes:
        return
    records, group = session.records, session.parallel.dp_group
    names = ", ".join(scheme.quant_type for scheme in session.schemes)
    # A data-parallel rank without a prompt of its own is fine, and must not leave the others waiting.
    count = session.measured.forwards if session.measured else len(records)
    if not reduce_over(group, "sum", torch.tensor(count)):
        raise InputError(
            f"{names} needs calibration data and got none",
            where="calib_data",
            why="static ranges and attention scales are measured by replaying what the model was called with",
            advice=f"dump some with DumperManager, or use {schemes_that(lambda s: not s.observes_input)} without fa3",
        )
    if session.per_step and (unknown := [i for i, record in enumerate(records) if record.step is None]):
        raise InputError(
            f"{len(unknown)} calibration records do not say their denoising step",
            where=f"calib_data, record {unknown[0]}",
            why=f"{names} keeps a range for each step",
            advice="dump with DumperManager(model, capture_mode='timestep')",
        )


def first_static_step(session: Session) -> int | None:
    """Return the first static step of a per-step scheme, or None for other schemes.

    One beyond the last step means that all steps run dynamic; it warns, because that is seldom what is wanted.
    """
    if not session.per_step:
        return None
    timesteps = len(session.steps)
    asked = next(config.timestep_sep for config in session.plan.values() if isinstance(config, PerStepConfig))
    first = separator(asked, timesteps)
    if first > timesteps:
        warnings.warn(
            f"timestep_sep {first} lies beyond the last of {timesteps} steps, so every step will run dynamic; "
            f"{timesteps // 2} would be half the steps",
            stacklevel=3,
        )
    return min(first, timesteps)
