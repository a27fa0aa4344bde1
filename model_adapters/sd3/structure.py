"""Which linears of SD3 share an input, and where its attentions are (spec: outlier suppression; FA3)."""

from __future__ import annotations

from quant_core.structure import AttentionValues, ModelStructure, Modulation, SmoothingGroup

_BLOCK = "transformer_blocks.*"
# adaLN-Zero makes six chunks: shift, scale and gate of the attention's input, then of the feed-forward's; with a second
# attention three more for its input. The last block's text stream ends behind its attention: scale, then shift.
_ATTENTION_CHUNKS = {6: (0, 1), 9: (0, 1), 2: (1, 0)}
_FEED_FORWARD_CHUNKS = {6: (3, 4), 9: (3, 4)}
_SECOND_ATTENTION_CHUNKS = {9: (6, 7)}
# One softmax mixes the values of both streams, so both feed both outputs; the second attention sees one stream.
_VALUES, _SECOND_VALUES = ("attn.to_v", "attn.add_v_proj"), ("attn2.to_v",)

STRUCTURE = ModelStructure(
    model_class="SD3Transformer2DModel",
    smoothing_groups=(SmoothingGroup(block="", linears=("context_embedder",)),),
    # The reference smooths nothing inside the blocks. The two attentions of an SD3.5 block see differently modulated
    # inputs, so they are two groups.
    optional_smoothing_groups=(
        SmoothingGroup(
            block=_BLOCK,
            linears=("attn.to_q", "attn.to_k", "attn.to_v"),
            modulation=Modulation(linear="norm1.linear", chunks=_ATTENTION_CHUNKS),
        ),
        SmoothingGroup(
            block=_BLOCK,
            linears=("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            modulation=Modulation(linear="norm1.linear", chunks=_SECOND_ATTENTION_CHUNKS),
        ),
        SmoothingGroup(
            block=_BLOCK,
            linears=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            modulation=Modulation(linear="norm1_context.linear", chunks=_ATTENTION_CHUNKS),
        ),
        SmoothingGroup(block=_BLOCK, linears=("attn.to_out.0",), values=_VALUES),
        SmoothingGroup(block=_BLOCK, linears=("attn2.to_out.0",), values=_SECOND_VALUES),
        SmoothingGroup(block=_BLOCK, linears=("attn.to_add_out",), values=_VALUES),
        SmoothingGroup(
            block=_BLOCK,
            linears=("ff.net.0.proj",),
            modulation=Modulation(linear="norm1.linear", chunks=_FEED_FORWARD_CHUNKS),
        ),
        SmoothingGroup(
            block=_BLOCK,
            linears=("ff_context.net.0.proj",),
            modulation=Modulation(linear="norm1_context.linear", chunks=_FEED_FORWARD_CHUNKS),
        ),
    ),
    # The usual one by measurement (scripts/choices.md): 0.9 makes the weights uneven, which costs static schemes 1 dB.
    reference_m4_alpha=0.9,
    smoothing_floor=1e-3,
    attentions=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    values=(
        AttentionValues(block=_BLOCK, attention="attn", made_by=_VALUES, read_by=("attn.to_out.0", "attn.to_add_out")),
        AttentionValues(block=_BLOCK, attention="attn2", made_by=_SECOND_VALUES, read_by=("attn2.to_out.0",)),
    ),
)
