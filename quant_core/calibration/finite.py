"""Refuse NaN and infinity where they first appear.

One activation that overflows (float16 ends at 65504) makes everything behind it NaN, and a NaN passes through maxima,
scales and files without a word until somebody looks at the images. So every layer whose input is measured must get
finite numbers. Reading a device's answer waits for the device: layers only note, and the answer is read once a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.errors import InputError

_ADVICE = "compute in bfloat16 (--dtype bfloat16) if the model is float16; else look for a damaged weight or record"


class FiniteInputs:
    """Note the extremes of each layer's input, in the order of the calls, until they are checked."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._extremes: list[Tensor] = []

    def noting(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Return a forward pre-hook that notes the input of the layer."""

        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.note(name, *inputs[0].aminmax())

        return note

    def note(self, name: str, low: Tensor, high: Tensor) -> None:
        """Note the extremes of one input of the layer, scalars."""
        self._names.append(name)
        self._extremes.append(torch.stack((low, high)).float())

    def check(self, where: str) -> None:
        """Check what was noted and forget it. Raises InputError naming the first layer with NaN or infinity."""
        names, extremes = self._names, self._extremes
        self._names, self._extremes = [], []
        if not names:
            return
        bad = (~torch.stack(extremes).isfinite().all(dim=1)).nonzero()
        if bad.numel():
            name = names[int(bad[0])]
            raise InputError(f"layer '{name}' got NaN or infinity", where=where, why=_why(name), advice=_ADVICE)


@contextmanager
def finite_inputs(model: nn.Module, layers: Iterable[str]) -> Iterator[FiniteInputs]:
    """Watch the inputs of the named layers inside the block."""
    inputs = FiniteInputs()
    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(inputs.noting(name)).remove)
        yield inputs


def check_part(layer: str, part: str, tensor: Tensor) -> None:
    """Check the row maxima of a layer's `weight`, or its `bias`. Raises InputError when one is NaN or infinite."""
    if not tensor.isfinite().all():
        raise InputError(
            f"the {part} of layer '{layer}' holds NaN or infinity",
            where=f"{layer}.{part}",
            why="it has no code; the file is damaged, or was written in a dtype whose range is too small",
            advice="copy the weights again, or compute in bfloat16 (--dtype bfloat16)",
        )


def check_attention(name: str, part: str, *, is_finite: bool) -> None:
    """Check what an attention multiplied; part: q, k or v. Raises InputError when it held NaN or infinity."""
    if not is_finite:
        raise InputError(
            f"attention '{name}' multiplied NaN or infinity",
            where=f"calib_data, {part} of {name}",
            why="it has no scale, and kernels may make finite numbers of it, which mean nothing",
            advice=_ADVICE,
        )


def check_captured(name: str, tensor: Tensor, where: str) -> None:
    """Check an argument that the model is called with. Raises InputError for NaN; a mask may hold infinity."""
    if tensor.is_floating_point() and tensor.isnan().any():
        raise InputError(
            f"the model is called with NaN in its argument '{name}'",
            where=where,
            why="an earlier step, a text encoder or a weight broke; what follows would calibrate on noise",
            advice=_ADVICE,
        )


def _why(name: str) -> str:
    return f"it is the first that did, so the numbers broke in front of {name}; a range of them means nothing"
