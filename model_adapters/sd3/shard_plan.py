"""The way SD3 and SD3.5 are divided over ranks (spec: tensor-parallel layouts, SD3).

Patterns of parts that a block lacks match nothing there: only SD3.5 has `attn2`, and the last block, which no longer
updates the text stream, has neither `to_add_out` nor `ff_context`.
"""

from __future__ import annotations

from model_adapters.parallel.shard_plan import Rule, ShardPlan
from quant_core.parallel.sharding import Style

_ATTENTIONS = ("transformer_blocks.*.attn", "transformer_blocks.*.attn2")

MEGATRON = ShardPlan(
    name="megatron",
    version=1,
    linears=(
        *(Rule(f"{attention}.to_[qkv]", Style.COL) for attention in _ATTENTIONS),
        *(Rule(f"{attention}.add_[qkv]_proj", Style.COL) for attention in _ATTENTIONS),
        *(Rule(f"{attention}.to_out.0", Style.ROW) for attention in _ATTENTIONS),
        *(Rule(f"{attention}.to_add_out", Style.ROW) for attention in _ATTENTIONS),
        Rule("transformer_blocks.*.ff.net.0.proj", Style.COL),
        Rule("transformer_blocks.*.ff.net.2", Style.ROW),
        Rule("transformer_blocks.*.ff_context.net.0.proj", Style.COL),
        Rule("transformer_blocks.*.ff_context.net.2", Style.ROW),
    ),
    local_heads=_ATTENTIONS,
)

SHARD_PLANS: dict[str, ShardPlan] = {MEGATRON.name: MEGATRON}
