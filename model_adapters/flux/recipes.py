"""Which layers stay float for each quantization type of FLUX (spec: which layers)."""

from __future__ import annotations

# The second feed-forward linears see the widest ranges; FA3's recipe quantizes them all the same.
_SECOND_FEED_FORWARD = ("*net.2*",)

DISABLED_LAYERS: dict[str, tuple[str, ...]] = {
    "w8a8": _SECOND_FEED_FORWARD,
    "w8a8_timestep": _SECOND_FEED_FORWARD,
    "w8a8_dynamic": _SECOND_FEED_FORWARD,
    "w8a8_dynamic_fa3": (),
}
