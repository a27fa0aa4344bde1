"""How a weight becomes codes: a scheme names its codec, and whoever touches a weight asks it.

Quantizing a layer, streaming it from disk and searching a smoothing factor then all mean the same codes. Nothing here
imports torch before it computes, because schemes are read by a command line too (`quant_core.schemes.scheme`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quant_core.arithmetic.blocks import Rows, magnitudes, row_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quant_core.arithmetic.numerics import Numerics


class QuantizedWeight(NamedTuple):
    """Hold a weight's int8 codes (O, I), and its scale (O, 1) in the model's dtype."""

    codes: Tensor
    scale: Tensor


class Int8Rows:
    """Codes from -127 to 127, symmetric around 0, with one scale for each output row."""

    def row_maxima(self, w_OI: Rows) -> Tensor:
        """Return what a row's scale follows from, (O, 1); shards that share scales take the maximum of theirs."""
        import torch

        return torch.cat([magnitudes(w_OI[rows]) for rows in row_blocks(w_OI)])

    def encode(
        self,
        w_OI: Rows,
        amax_O1: Tensor,
        dtype: torch.dtype,
        numerics: Numerics,
        *,
        fake_OI: Tensor | None = None,
        codes_OI: Tensor | None = None,
    ) -> QuantizedWeight:
        """Quantize a weight, or some rows of one.

        w_OI: in any precision; amax_O1: its row maxima, over all shards if they share scales; dtype: the model's.
        fake_OI: takes what the codes stand for, where somebody reads it; it may be the weight itself. codes_OI: takes
        the codes, where memory for them is there already.
        """
        import torch

        from quant_core.arithmetic.scales import QMAX, QMIN, reaching, symmetric_scale

        compute = dtype if numerics.is_reference else torch.float32
        scale_O1 = symmetric_scale(amax_O1.to(compute)).to(dtype)
        if not numerics.is_reference:
            scale_O1 = reaching(scale_O1, amax_O1, QMAX + 0.5)
        exact_O1 = scale_O1.to(compute)
        # The reference tool computes with -128 where its rounding leads there, and stores -127.
        least = QMIN if numerics.is_reference else -QMAX
        if codes_OI is None:
            codes_OI = torch.empty(tuple(w_OI.shape), dtype=torch.int8, device=w_OI.device)
        buffer = None
        for rows in row_blocks(w_OI):
            block = w_OI[rows]
            buffer = torch.empty(block.shape, dtype=compute, device=block.device) if buffer is None else buffer
            points = buffer[: len(block)].copy_(block).div_(exact_O1[rows]).round_().clamp_(least, QMAX)
            codes_OI[rows] = points
            if fake_OI is not None:
                fake_OI[rows] = points.mul_(exact_O1[rows])
        if numerics.is_reference:
            codes_OI.clamp_(min=-QMAX)
        return QuantizedWeight(codes_OI, scale_O1)

    def coarsen(self, codes_OI: Tensor, scale_O1: Tensor, least_O1: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of the same weight in which no scale is below the least; most rows stay as they are.

        least_O1: float32, on the host as the codes are; a changed scale is rounded up to its dtype.
        """
        import torch

        host_O1, kind = scale_O1.cpu(), torch.finfo(scale_O1.dtype)
        rows = (host_O1.float() < least_O1).squeeze(1)
        if not rows.any():
            return codes_OI, scale_O1
        wider = (least_O1[rows] * (1 + kind.eps) + kind.smallest_normal * kind.eps).to(host_O1)
        codes_OI, coarse_O1 = codes_OI.clone(), host_O1.clone()
        codes_OI[rows] = (self.decode(codes_OI[rows], host_O1[rows]) / wider.float()).round().to(codes_OI)
        coarse_O1[rows] = wider
        return codes_OI, coarse_O1.to(scale_O1)

    def decode(self, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
        """Return the weight that stored codes stand for, (O, I) float32."""
        return codes_OI.float() * scale_O1.float()

    def round_trip(self, w_OI: Tensor) -> Tensor:
        """Return a weight as its codes would have it, in its own precision and with unrounded scales: for a search."""
        from quant_core.arithmetic.scales import QMAX, divided

        scale_O1 = divided(self.row_maxima(w_OI), QMAX)
        scale_O1 = scale_O1.masked_fill(scale_O1 == 0, 1)  # a row of zeros, which any scale stands for
        return (w_OI / scale_O1).round_().clamp_(-QMAX, QMAX).mul_(scale_O1)


INT8_ROWS = Int8Rows()
