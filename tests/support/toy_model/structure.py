"""Which linears of the toy model share an input, and where its attentions are."""

from __future__ import annotations

from quant_core.structure import ModelStructure, SmoothingGroup

STRUCTURE = ModelStructure(
    model_class="ToyTransformer",
    smoothing_groups=(SmoothingGroup(block="blocks.*", linears=("attn.to_q", "attn.to_k", "attn.to_v")),),
    attentions=("blocks.*.attn",),
)
