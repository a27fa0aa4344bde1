"""Which layers stay float for each quantization type of FLUX (spec: which layers)."""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.schemes import QUANT_TYPES

# The second feed-forward linears see the widest ranges; FA3's recipe quantizes them all the same.
DISABLED_LAYERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(QUANT_TYPES, ("*net.2*",)),
    "w8a8_dynamic_fa3": (),
}
