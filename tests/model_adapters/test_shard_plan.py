"""The plans divide the real models as published, agree with diffusers' own plan, and refuse uneven splits early."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import prod
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from model_adapters import load_adapter
from model_adapters.flux.shard_plan import MEGATRON, MINDIE
from model_adapters.parallel.shard_plan import Rule, ShardPlan
from model_adapters.sd3.shard_plan import MEGATRON as SD3_MEGATRON
from quant_core.errors import ConfigurationError
from quant_core.naming import linear_names
from quant_core.parallel.sharding import Shard, Style

GIB = 2**30
BF16 = 2  # bytes

# The published configurations of the real models, where they differ from diffusers' defaults.
_SD3_SHARED = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "SD3-medium": (
        SD3Transformer2DModel,
        _SD3_SHARED
        | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "SD3.5-medium": (
        SD3Transformer2DModel,
        _SD3_SHARED
        | {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "SD3.5-large": (
        SD3Transformer2DModel,
        _SD3_SHARED
        | {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
}


@cache
def on_meta(model: str) -> Any:
    """The real model without its numbers."""
    model_class, config = CONFIGS[model]
    with init_empty_weights(include_buffers=True):
        return model_class(**config)


def bytes_per_rank(model: nn.Module, shards: dict[str, Shard]) -> int:
    """Bytes of parameters and buffers that rank 0 holds in bf16."""
    whole = Shard(Style.REPLICATED, 0, 1)
    split = ((name.rpartition("."), tensor.shape) for name, tensor in model.state_dict().items())
    return BF16 * sum(prod(shards.get(layer, whole).local_shape(leaf, shape)) for (layer, _, leaf), shape in split)


# Linears by style and GiB of a rank in bf16 at tp 2 (spec: tensor-parallel layouts).
@pytest.mark.parametrize(
    ("model", "plan", "linears", "counts", "gib"),
    [
        ("FLUX.1-dev", MINDIE, 504, {Style.COL: 304, Style.ROW: 76, Style.COL_GATHER: 38}, 14.15),
        ("FLUX.1-dev", MEGATRON, 504, {Style.COL: 304, Style.ROW: 76, Style.ROW_PACKED: 38}, 14.15),
        ("SD3-medium", SD3_MEGATRON, 340, {Style.COL: 191, Style.ROW: 94}, 2.64),
        ("SD3.5-medium", SD3_MEGATRON, None, None, 3.24),
        ("SD3.5-large", SD3_MEGATRON, None, None, 10.20),
    ],
)
def test_the_real_models_divide_as_published(model, plan, linears, counts, gib):
    whole = on_meta(model)
    shards = plan.resolve(whole, 0, 2)
    if counts:
        assert len(linear_names(whole)) == linears
        assert Counter(shard.style for shard in shards.values()) == counts
    assert bytes_per_rank(whole, shards) / GIB == pytest.approx(gib, abs=0.006)  # published with two decimals


def test_megatron_is_the_plan_that_diffusers_carries_for_flux():
    theirs = getattr(FluxTransformer2DModel, "_tp_plan", None)
    if theirs is None:
        pytest.skip("this diffusers has no plan of its own to compare with")
    styles = {"colwise": Style.COL, "rowwise": Style.ROW}
    rules = tuple(Rule(name, styles.get(str(s), Style.ROW_PACKED)) for name, s in theirs.items())
    model = on_meta("FLUX.1-dev")
    ours = {name: shard.style for name, shard in MEGATRON.resolve(model, 0, 2).items()}
    plan = ShardPlan("diffusers", 1, rules)
    assert ours == {name: rule.style for name in linear_names(model) if (rule := plan.rule_for(name))}


def test_packed_blocks_are_attention_then_feed_forward_as_diffusers_packs_them():
    model = on_meta("FLUX.1-dev")
    shard = MEGATRON.resolve(model, 1, 2)["single_transformer_blocks.37.proj_out"]
    assert shard.blocks == (3072, 12288)
    theirs = getattr(model.single_transformer_blocks[37].proj_out, "_tp_packed_row_blocks", [3072, 12288])
    assert list(shard.blocks) == list(theirs)


def test_every_pattern_of_a_flux_plan_matches_a_layer():
    names = linear_names(on_meta("FLUX.1-dev"))
    for plan in (MINDIE, MEGATRON):
        assert {rule.pattern for rule in plan.linears} == {
            rule.pattern for name in names if (rule := plan.rule_for(name)) is not None
        }


def test_every_pattern_of_the_sd3_plan_matches_a_layer_of_sd35_or_can_only_exist_in_joint_attention():
    names = linear_names(on_meta("SD3.5-medium"))
    unmatched = {rule.pattern for rule in SD3_MEGATRON.linears} - {
        rule.pattern for name in names if (rule := SD3_MEGATRON.rule_for(name)) is not None
    }
    # The second attention of a block sees the image only: today it has no text projections.
    assert unmatched == {f"transformer_blocks.*.attn2.{part}" for part in ("add_[qkv]_proj", "to_add_out")}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (2, 3), (3, 4)])
def test_each_shard_knows_its_rank_and_group(rank, size):
    shards = MINDIE.resolve(on_meta("FLUX.1-dev"), rank, size)
    assert {(shard.rank, shard.size) for shard in shards.values()} == {(rank, size)}


def test_an_uneven_split_lists_every_problem_once_and_the_sizes_that_fit():
    with pytest.raises(ConfigurationError) as caught:
        MEGATRON.resolve(on_meta("FLUX.1-dev"), 0, 5)
    assert caught.value.what == "FluxTransformer2DModel cannot be divided over 5 tensor-parallel ranks"
    assert caught.value.where == "tp_size 5, layout megatron"
    problems = caught.value.why.removeprefix("5 does not divide: ").split("; ")
    assert "transformer_blocks.*.attn: 24 heads" in problems
    assert "transformer_blocks.*.ff.net.0.proj: 12288 outputs" in problems
    assert "single_transformer_blocks.*.proj_out: 12288 inputs in one block" in problems
    # 2 attentions, 12 linears of the double block, 4 of the single one, and the 2 packed blocks of its proj_out, whose
    # whole width, 15360, is divisible by 5: looking at that alone would let a wrong split pass.
    assert len(problems) == len(set(problems)) == 20
    assert caught.value.advice == "a tensor-parallel size of 1 or 2 or 3 or 4"


def test_heads_alone_forbid_a_size_that_all_widths_allow():
    # 38 heads of 64: width 2432 is divisible by 4, the heads are not.
    with pytest.raises(ConfigurationError, match="38 heads") as caught:
        SD3_MEGATRON.resolve(on_meta("SD3.5-large"), 0, 4)
    assert caught.value.advice == "a tensor-parallel size of 1 or 2"


@pytest.mark.parametrize(("name", "layouts"), [("flux", ["mindie", "megatron"]), ("sd3", ["megatron"])])
def test_the_first_layout_is_the_default(name, layouts):
    adapter = load_adapter(name)
    assert list(adapter.shard_plans) == layouts
    assert adapter.shard_plan().name == layouts[0]
    assert adapter.shard_plan(layouts[-1]).name == layouts[-1]


def test_an_unknown_layout_names_the_nearest():
    with pytest.raises(ConfigurationError, match="'megatorn'") as caught:
        load_adapter("flux").shard_plan("megatorn")
    assert caught.value.advice == "megatron (nearest name)"
