"""Which layers stay float for each quantization type of SD3 (spec: which layers)."""

from __future__ import annotations

_TEXT_INPUT = ("context_embedder",)

DISABLED_LAYERS: dict[str, tuple[str, ...]] = {
    "w8a8": _TEXT_INPUT,
    "w8a8_timestep": _TEXT_INPUT,
    "w8a8_dynamic": _TEXT_INPUT,
    "w8a8_dynamic_fa3": _TEXT_INPUT,
}
