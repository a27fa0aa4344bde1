"""What was measured in the float model's own forwards: calibration data that nothing has to be replayed of.

It is plain data, so that a file can hold it: for each watched layer what its `InputObserver` saved, for each attention
its ranges, and how many forwards it rests on. A layer that may be smoothed has the extremes of each channel; a factor
divides these as it divides the input, and rounding keeps their order, so the range behind it is exact:

    channels [-4, 8] and [-1, 1], factors 1/4 and 1: [-1, 2] and [-1, 1], and so the range [-1, 2]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import InputError


@dataclass(frozen=True)
class Measured:
    """Hold what one rank's `OnlineCalibration` saw; a `SessionConfig` takes it as its calibration data.

    kept: what of each layer, in words that are the same for the same session. `vars` of it is what a file holds, and
    `Measured(**data)` takes that back.
    """

    forwards: int = 0
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attentions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """Return the last denoising step that a range is of, -1 if none is."""
        return max((s for saved in self.layers.values() for s in saved["steps"] if s is not None), default=-1)

    def of_layer(self, name: str) -> Mapping[str, Any]:
        """Return what was saved of a layer. Raises InputError when it was not watched."""
        return _found(self.layers, name, "layer")

    def of_attention(self, name: str) -> Mapping[str, Any]:
        """Return what was saved of an attention. Raises InputError when it was not watched."""
        return _found(self.attentions, name, "attention")

    def channel_maxima(self, name: str) -> Tensor | None:
        """Return the largest |x| of each input channel of a layer, (I,), or None when it never ran here."""
        saved = self.of_layer(name)
        if not saved["steps"]:
            return None
        return torch.maximum(-saved["low"].amin(0), saved["high"].amax(0))

    def behind(self, name: str, mul_scale_I: Tensor | None) -> Mapping[str, Any]:
        """Return what a plain observer of the layer would have saved behind a factor; mul_scale_I: in its dtype."""
        saved = self.of_layer(name)
        if not saved["steps"] or saved["low"].ndim == 1:
            return saved
        factor_I = 1 if mul_scale_I is None else mul_scale_I.cpu()
        return {**saved, "low": (saved["low"] * factor_I).amin(1), "high": (saved["high"] * factor_I).amax(1)}


def require_kept(measured: Measured, wanted: Mapping[str, str]) -> None:
    """Check that of each layer was kept what is wanted. Raises InputError naming the first of which it was not."""
    for name, kept in wanted.items():
        measured.of_layer(name)
        if (found := measured.kept.get(name, "(unknown)")) != kept:
            raise InputError(
                f"the calibration kept the {found} of layer '{name}', and {kept} is wanted",
                where="calib_data",
                why="it was measured for another session",
                advice="measure with the session that is to quantize",
            )


def _found(saved: Mapping[str, Mapping[str, Any]], name: str, kind: str) -> Mapping[str, Any]:
    if name in saved:
        return saved[name]
    raise InputError(
        f"the calibration did not watch {kind} '{name}'",
        where=f"calib_data (it has {len(saved)} of these)",
        why="it was measured for another session, or another model",
        advice="measure with the session that is to quantize",
    )
