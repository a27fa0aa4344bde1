"""Send calibration records through a model again, each once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.calibration.finite import finite_inputs
from quant_core.calibration.records import Record
from quant_core.calibration.timestep import TimestepManager

# stage, records done, records in all
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@torch.no_grad()
def replay(
    model: nn.Module,
    records: Sequence[Record],
    *,
    stage: str,
    measured: Iterable[str] = (),
    begin: Callable[[int], None] = lambda index: None,
    progress: Progress = silent,
) -> None:
    """Call the model with every record on the model's device, its denoising step set for whoever asks.

    `begin` is told the index of each record before it, and progress is reported after it, under the name of the stage.
    Raises InputError when one of the `measured`
    layers gets numbers that are not finite.
    """
    device = next(model.parameters()).device
    before = TimestepManager.get_timestep_idx()
    try:
        with finite_inputs(model, measured) as inputs, _evaluating(model):
            for done, record in enumerate(records, start=1):
                TimestepManager.set_timestep_idx(record.step)
                begin(done - 1)
                model(*to_device(list(record.args), device), **to_device(dict(record.kwargs), device))
                inputs.check(_name_of(done - 1, record))
                progress(stage, done, len(records))
    finally:
        TimestepManager.set_timestep_idx(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Keep dropout and its like out of what is measured."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _name_of(index: int, record: Record) -> str:
    return f"calib_data, record {index}" + ("" if record.step is None else f" (step {record.step})")


def to_device(value: Any, device: torch.device) -> Any:
    """Return nested lists, tuples and mappings with their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
