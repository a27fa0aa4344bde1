"""Which linears of SD3 share an input, and where its attentions are (spec: outlier suppression; FA3)."""

from __future__ import annotations

from quant_core.structure import ModelStructure, SmoothingGroup

STRUCTURE = ModelStructure(
    model_class="SD3Transformer2DModel",
    smoothing_groups=(SmoothingGroup(block="", linears=("context_embedder",)),),
    attentions=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
)

_BLOCK = "transformer_blocks.*"

# The reference smooths nothing inside the blocks; whoever wants to gives this structure to the quantizer. The two
# attentions of an SD3.5 block see differently modulated inputs, so they are two groups.
BLOCKS_STRUCTURE = ModelStructure(
    model_class=STRUCTURE.model_class,
    smoothing_groups=(
        *STRUCTURE.smoothing_groups,
        SmoothingGroup(block=_BLOCK, linears=("attn.to_q", "attn.to_k", "attn.to_v")),
        SmoothingGroup(block=_BLOCK, linears=("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        SmoothingGroup(block=_BLOCK, linears=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        SmoothingGroup(block=_BLOCK, linears=("attn.to_out.0",)),
        SmoothingGroup(block=_BLOCK, linears=("attn2.to_out.0",)),
        SmoothingGroup(block=_BLOCK, linears=("attn.to_add_out",)),
        SmoothingGroup(block=_BLOCK, linears=("ff.net.0.proj",)),
        SmoothingGroup(block=_BLOCK, linears=("ff_context.net.0.proj",)),
    ),
    attentions=STRUCTURE.attentions,
)
