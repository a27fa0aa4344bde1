"""Which linears of FLUX share an input, and where its attentions are (spec: outlier suppression; FA3)."""

from __future__ import annotations

from quant_core.structure import AttentionValues, ModelStructure, Modulation, SmoothingGroup

_DOUBLE = "transformer_blocks.*"

# adaLN-Zero makes six chunks: shift, scale and gate of the attention's input, then of the feed-forward's.
_ATTENTION_CHUNKS, _FEED_FORWARD_CHUNKS = {6: (0, 1)}, {6: (3, 4)}
# One softmax mixes the values of both streams, so both feed both outputs.
_VALUES = ("attn.to_v", "attn.add_v_proj")

STRUCTURE = ModelStructure(
    model_class="FluxTransformer2DModel",
    smoothing_groups=(
        SmoothingGroup(
            block=_DOUBLE,
            linears=("attn.to_q", "attn.to_k", "attn.to_v"),
            modulation=Modulation(linear="norm1.linear", chunks=_ATTENTION_CHUNKS),
        ),
        SmoothingGroup(
            block=_DOUBLE,
            linears=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            modulation=Modulation(linear="norm1_context.linear", chunks=_ATTENTION_CHUNKS),
        ),
        SmoothingGroup(block=_DOUBLE, linears=("attn.to_out.0",), values=_VALUES),
        SmoothingGroup(block=_DOUBLE, linears=("attn.to_add_out",), values=_VALUES),
        SmoothingGroup(
            block=_DOUBLE,
            linears=("ff.net.0.proj",),
            modulation=Modulation(linear="norm1.linear", chunks=_FEED_FORWARD_CHUNKS),
        ),
        SmoothingGroup(
            block=_DOUBLE,
            linears=("ff_context.net.0.proj",),
            modulation=Modulation(linear="norm1_context.linear", chunks=_FEED_FORWARD_CHUNKS),
        ),
    ),
    attentions=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    values=(
        AttentionValues(block=_DOUBLE, attention="attn", made_by=_VALUES, read_by=("attn.to_out.0", "attn.to_add_out")),
        # The attention's output comes first in what the layer reads, then the feed-forward's.
        AttentionValues(
            block="single_transformer_blocks.*", attention="attn", made_by=("attn.to_v",), read_by=("proj_out",)
        ),
    ),
)
