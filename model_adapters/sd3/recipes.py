"""Which layers stay float for each quantization type of SD3 (spec: which layers)."""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.schemes import QUANT_TYPES

DISABLED_LAYERS: Mapping[str, tuple[str, ...]] = dict.fromkeys(QUANT_TYPES, ("context_embedder",))
