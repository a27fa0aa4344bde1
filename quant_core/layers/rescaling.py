"""Give the channels between linear layers another scale without changing what the model computes.

A linear that consumes a channel multiplies its column by what the channel is divided by. The division itself is either
done at run time (`mul_scale_I`, a multiplication in front of the layer) or absorbed by the linear that produces the
channel, whose row and bias are divided instead (spec: outlier suppression).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import Numerics


@dataclass(frozen=True)
class Rescaling:
    """Say how one linear and its input change; what is None stays as it is.

    `w' = rows_O * w * columns_I`, `b' = rows_O * b + bias_shift_O`, `x' = x * mul_scale_I`.
    """

    columns_I: Tensor | None = None
    mul_scale_I: Tensor | None = None
    rows_O: Tensor | None = None
    bias_shift_O: Tensor | None = None

    def weight(self, w_RI: Tensor, rows: slice) -> Tensor:
        """Return these rows of the weight changed, computed in the dtype in which they are given."""
        if self.columns_I is not None:
            w_RI = w_RI * self.columns_I.to(w_RI)
        if self.rows_O is not None:
            w_RI = w_RI * self.rows_O[rows].to(w_RI).unsqueeze(1)
        return w_RI

    def bias(self, b_O: Tensor) -> Tensor:
        """Return the changed bias, computed in float32 and rounded once to the bias's dtype."""
        changed_O = b_O.to(torch.float32)
        if self.rows_O is not None:
            changed_O = changed_O * self.rows_O.to(changed_O)
        if self.bias_shift_O is not None:
            changed_O = changed_O + self.bias_shift_O.to(changed_O)
        return changed_O.to(b_O.dtype)

    def then(self, later: Rescaling) -> Rescaling:
        """Return the two changes, one after the other, as one."""
        shift_O = self.bias_shift_O
        if shift_O is not None and later.rows_O is not None:
            shift_O = shift_O * later.rows_O
        return Rescaling(
            columns_I=_product(self.columns_I, later.columns_I),
            mul_scale_I=_product(self.mul_scale_I, later.mul_scale_I),
            rows_O=_product(self.rows_O, later.rows_O),
            bias_shift_O=shift_O
            if later.bias_shift_O is None
            else later.bias_shift_O + (0 if shift_O is None else shift_O),
        )


@dataclass(frozen=True)
class RescaledRows:
    """A weight (O, I) whose rows are changed when they are asked for, in the precision that numerics computes in."""

    weight: Tensor
    rescaling: Rescaling
    numerics: Numerics

    @property
    def shape(self) -> torch.Size:
        """The weight's own."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return these rows, changed."""
        return self.rescaling.weight(self.numerics.working(self.weight[rows]), rows)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
