"""The two ways FLUX is divided over ranks (spec: tensor-parallel layouts, FLUX)."""

from __future__ import annotations

from model_adapters.parallel.shard_plan import Rule, ShardPlan
from quant_core.parallel.sharding import Style

_COMMON = (
    Rule("transformer_blocks.*.attn.to_[qkv]", Style.COL),
    Rule("transformer_blocks.*.attn.add_[qkv]_proj", Style.COL),
    Rule("transformer_blocks.*.attn.to_out.0", Style.ROW),
    Rule("transformer_blocks.*.attn.to_add_out", Style.ROW),
    Rule("transformer_blocks.*.ff.net.0.proj", Style.COL),
    Rule("transformer_blocks.*.ff.net.2", Style.ROW),
    Rule("transformer_blocks.*.ff_context.net.0.proj", Style.COL),
    Rule("transformer_blocks.*.ff_context.net.2", Style.ROW),
    Rule("single_transformer_blocks.*.attn.to_[qkv]", Style.COL),
    Rule("single_transformer_blocks.*.proj_mlp", Style.COL),
)
_ATTENTIONS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

# What the dual-card runtime loads: the layer that joins attention and feed-forward sees its whole input.
MINDIE = ShardPlan(
    name="mindie",
    version=1,
    linears=(*_COMMON, Rule("single_transformer_blocks.*.proj_out", Style.COL_GATHER)),
    gather_outputs=("single_transformer_blocks.*.attn", "single_transformer_blocks.*.act_mlp"),
    local_heads=_ATTENTIONS,
    has_rank_folders=True,
)

# One sum instead of three gathers per single-stream block; the layout of diffusers' own plan.
MEGATRON = ShardPlan(
    name="megatron",
    version=1,
    linears=(*_COMMON, Rule("single_transformer_blocks.*.proj_out", Style.ROW_PACKED, ("attn.to_v", "proj_mlp"))),
    local_heads=_ATTENTIONS,
)

SHARD_PLANS: dict[str, ShardPlan] = {plan.name: plan for plan in (MINDIE, MEGATRON)}
