"""Which linears of FLUX share an input, and where its attentions are (spec: outlier suppression; FA3)."""

from __future__ import annotations

from quant_core.structure import ModelStructure, SmoothingGroup

_DOUBLE = "transformer_blocks.*"

STRUCTURE = ModelStructure(
    model_class="FluxTransformer2DModel",
    smoothing_groups=(
        SmoothingGroup(block=_DOUBLE, linears=("attn.to_q", "attn.to_k", "attn.to_v")),
        SmoothingGroup(block=_DOUBLE, linears=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        SmoothingGroup(block=_DOUBLE, linears=("attn.to_out.0",)),
        SmoothingGroup(block=_DOUBLE, linears=("attn.to_add_out",)),
        SmoothingGroup(block=_DOUBLE, linears=("ff.net.0.proj",)),
        SmoothingGroup(block=_DOUBLE, linears=("ff_context.net.0.proj",)),
    ),
    attentions=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
)
