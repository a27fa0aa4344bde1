"""Keep the ranges of one attention's q, k and v over all calls, and make scales of them (spec: FA3).

Suffixes: B samples, H heads, S tokens, D channels of a head, R rows that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics
from quant_core.arithmetic.scales import QMAX, reaching, symmetric_scale
from quant_core.attention.window import shortest_window
from quant_core.checkpoint.entries import FA_QUANT, Entry
from quant_core.errors import InputError
from quant_core.parallel.groups import Reduction

# The share of the values that the range of each tensor holds. Attention weighs v's values, so none is cut.
SHARES = {"q": 0.9999, "k": 0.9999, "v": 1.0}


class HeadRange:
    """The range of one tensor over all calls: a low and a high end for each row, on the host.

    Before the first call it has no rows; `with_rows` makes it the neutral element of a reduction over ranks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.low_R = torch.empty(0, dtype=dtype)
        self.high_R = torch.empty(0, dtype=dtype)

    @property
    def rows(self) -> int:
        """Return the number of rows, 0 before the first call."""
        return len(self.low_R)

    def with_rows(self, rows: int) -> None:
        """Become a range of that many rows that contains nothing, unless there have been calls."""
        if not self.rows:
            self.low_R = self.low_R.new_full((rows,), float("inf"))
            self.high_R = self.high_R.new_full((rows,), float("-inf"))

    def widen(self, low_R: Tensor, high_R: Tensor) -> None:
        """Widen to contain one call's range."""
        self.with_rows(len(low_R))
        # Where ranks combine their ranges, NaN may get lost, and infinity stays.
        low_R, high_R = low_R.to(self.low_R), high_R.to(self.high_R)
        self.low_R = torch.minimum(self.low_R, low_R.where(~low_R.isnan(), float("-inf")))
        self.high_R = torch.maximum(self.high_R, high_R.where(~high_R.isnan(), float("inf")))

    @property
    def is_finite(self) -> bool:
        """Whether every number of every call was finite."""
        return bool(self.low_R.isfinite().all() and self.high_R.isfinite().all())

    def scale(self, numerics: Numerics) -> Tensor:
        """Return the symmetric scales (R, 1) in the range's dtype."""
        compute = self.low_R.dtype if numerics.is_reference else torch.float32
        amax_R = torch.maximum(-self.low_R, self.high_R).to(compute)
        scale_R = symmetric_scale(amax_R.clamp(min=0)).to(self.low_R.dtype)
        return (scale_R if numerics.is_reference else reaching(scale_R, amax_R, QMAX + 0.5)).unsqueeze(1)


class AttentionObserver:
    """Watch q, k and v of one attention; `dtype` is the model's, in which the scales are stored."""

    def __init__(self, name: str, dtype: torch.dtype, numerics: Numerics) -> None:
        self.name = name
        self.ranges = {part: HeadRange(dtype) for part in SHARES}
        self._numerics = numerics

    def observe(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Take in one call; each tensor (B, H, S, D). Nothing of it is kept but its range."""
        for (part, share), x_BHSD in zip(SHARES.items(), (query, key, value)):
            low_R, high_R = shortest_window(self._numerics.attention_rows(x_BHSD), share)
            if self.ranges[part].rows not in (0, len(low_R)):
                raise _rows_changed(self.name, self.ranges[part].rows, len(low_R))
            self.ranges[part].widen(low_R, high_R)

    def state(self) -> Iterator[tuple[Reduction, Tensor, Callable[[Tensor], None]]]:
        """Yield each state tensor with its reduction over ranks and where the reduced one goes."""
        for found in self.ranges.values():
            yield "min", found.low_R, partial(setattr, found, "low_R")
            yield "max", found.high_R, partial(setattr, found, "high_R")

    def saved(self) -> dict[str, Any]:
        """Return the ranges as plain data."""
        return {part: {"low": found.low_R, "high": found.high_R} for part, found in self.ranges.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what another one has saved."""
        for part, found in self.ranges.items():
            found.low_R, found.high_R = saved[part]["low"].clone(), saved[part]["high"].clone()

    def entries(self) -> list[Entry]:
        """Return the scales of q, k, v, then their offsets, which are int8 zeros."""
        scales = {part: found.scale(self._numerics) for part, found in self.ranges.items()}
        zeros = {part: torch.zeros_like(scale, dtype=torch.int8) for part, scale in scales.items()}
        return [
            Entry(f"{self.name}.fa_{part}.{kind}", FA_QUANT, tensor)
            for kind, tensors in (("scale", scales), ("offset", zeros))
            for part, tensor in tensors.items()
        ]


def _rows_changed(name: str, before: int, now: int) -> InputError:
    return InputError(
        f"attention '{name}' had {before} rows of scales and now has {now}",
        where="calib_data",
        why="numerics='reference' keeps a scale per token position, so all records need one length of text and image",
        advice="calibrate with one image size and one prompt length, or use numerics='float32' (scales per head)",
    )
