"""Which layers stay float for each quantization type of the toy model: none."""

from __future__ import annotations

DISABLED_LAYERS: dict[str, tuple[str, ...]] = {
    "w8a8": (),
    "w8a8_timestep": (),
    "w8a8_dynamic": (),
    "w8a8_dynamic_fa3": (),
}
