"""Which linears of SD3 share an input, and where its attentions are (spec: outlier suppression; FA3)."""

from __future__ import annotations

from quant_core.structure import ModelStructure, SmoothingGroup

STRUCTURE = ModelStructure(
    model_class="SD3Transformer2DModel",
    smoothing_groups=(SmoothingGroup(block="", linears=("context_embedder",)),),
    attentions=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
)
