"""The way the toy model is divided over ranks."""

from __future__ import annotations

from model_adapters.parallel.shard_plan import Rule, ShardPlan
from quant_core.parallel.sharding import Style

MEGATRON = ShardPlan(
    name="megatron",
    version=1,
    linears=(
        Rule("blocks.*.attn.to_[qkv]", Style.COL),
        Rule("blocks.*.attn.to_out", Style.ROW),
        Rule("blocks.*.up", Style.COL),
        Rule("blocks.*.down", Style.ROW),
    ),
    local_heads=("blocks.*.attn",),
)

SHARD_PLANS: dict[str, ShardPlan] = {MEGATRON.name: MEGATRON}
