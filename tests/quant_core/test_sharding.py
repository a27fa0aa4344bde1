"""Splitting and joining are inverse to each other, and the arithmetic is that of a linear layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS
from quant_core.errors import ConfigurationError, InputError, VerificationError
from quant_core.parallel.sharding import Shard, Style, cut, join

WEIGHT = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
BIAS = torch.tensor([10.0, 20])
DTYPES = [torch.bfloat16, torch.float32]
SPLIT_STYLES = [Style.COL, Style.ROW, Style.COL_GATHER, Style.ROW_PACKED]


def shards(style: Style, size: int, blocks: tuple[int, ...] = ()) -> list[Shard]:
    """All ranks' shards of one layer."""
    return [Shard(style, rank, size, blocks) for rank in range(size)]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[Shard], int, int]:
    """A style, 1 to 4 ranks, blocks that divide evenly; returns the shards and the layer's O and I."""
    size = draw(st.integers(1, 4))
    blocks = tuple(size * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3))))
    style = draw(st.sampled_from(list(Style)))
    outputs = size * draw(st.integers(1, 3))
    return shards(style, size, blocks if style is Style.ROW_PACKED else ()), outputs, sum(blocks)


def full_tensors(outputs: int, inputs: int) -> dict[str, Tensor]:
    """One tensor of each kind that a style divides or replicates, all values distinct; 3 timesteps."""
    shapes = {
        "weight": (outputs, inputs),
        "bias": (outputs,),
        "weight_scale": (outputs, 1),
        "weight_offset": (outputs, 1),
        "input_scale": (3, 1),
        "input_offset": (1,),
        "deq_scale": (3, outputs),
        "mul_scale": (inputs,),
    }
    return {name: torch.arange(torch.Size(shape).numel()).reshape(shape) for name, shape in shapes.items()}


@given(layers())
def test_split_then_join_is_identity_for_every_tensor_and_style(layer):
    ranks, outputs, inputs = layer
    for name, full in full_tensors(outputs, inputs).items():
        parts = [shard.take(name, full) for shard in ranks]
        joined = join(f"block.0.{name}", parts, ranks[0])
        assert joined is not None
        assert torch.equal(joined, full)
        assert all(part is None or part.shape == s.local_shape(name, full.shape) for part, s in zip(parts, ranks))


@given(
    layers(), st.integers(0, 2**31), st.sampled_from(sorted(NUMERICS)), st.sampled_from([torch.bfloat16, torch.float32])
)
def test_shards_that_share_their_row_maxima_quantize_and_join_to_the_quantized_whole(layer, seed, numerics, dtype):
    ranks, outputs, inputs = layer
    w_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = INT8_ROWS.encode(w_OI, w_OI.abs().amax(1, keepdim=True), dtype, NUMERICS[numerics])
    parts = [shard.take_weight(w_OI) for shard in ranks]
    maxima = [part.abs().amax(1, keepdim=True) for part in parts]
    if ranks[0].split_dim == 1:  # what scale_sync="global" reduces over the ranks
        maxima = [torch.stack(maxima).amax(0)] * len(ranks)
    found = [INT8_ROWS.encode(part, amax, dtype, NUMERICS[numerics]) for part, amax in zip(parts, maxima)]
    for name, full in {"weight": whole.codes, "weight_scale": whole.scale}.items():
        pieces = [weight.codes if name == "weight" else weight.scale for weight in found]
        joined = join(f"block.0.{name}", pieces, ranks[0])
        assert joined is not None
        assert torch.equal(joined, full), name


@given(layers())
def test_the_sum_or_concatenation_of_the_local_outputs_is_the_whole_output(layer):
    ranks, outputs, inputs = layer
    weight, bias = torch.randint(-9, 9, (outputs, inputs)).double(), torch.randint(-9, 9, (outputs,)).double()
    x = torch.randint(-9, 9, (5, inputs)).double()  # small integers: every sum is exact
    # A row-split layer's input is divided as its weight's columns are: as a "mul_scale" is.
    local = [
        linear(x if s.split_dim != 1 else taken(s, "mul_scale", x), s.take_weight(weight), s.take_bias(bias))
        for s in ranks
    ]
    combined = {0: lambda: torch.cat(local, dim=-1), 1: lambda: sum(local), None: lambda: local[0]}[
        ranks[0].split_dim
    ]()
    assert torch.equal(combined, linear(x, weight, bias))


def taken(shard: Shard, name: str, full: Tensor) -> Tensor:
    """This rank's part, which is known to exist."""
    part = shard.take(name, full)
    assert part is not None
    return part


def test_the_worked_example_of_the_module_holds():
    x = torch.ones(4)
    col, row = shards(Style.COL, 2), shards(Style.ROW, 2)
    assert [linear(x, s.take_weight(WEIGHT), s.take_bias(BIAS)).tolist() for s in col] == [[20], [46]]
    halves = [linear(x[:2], s.take_weight(WEIGHT), s.take_bias(BIAS)).tolist() for s in row]
    assert halves == [[13, 31], [7, 15]]
    packed = shards(Style.ROW_PACKED, 2, (2, 2))
    assert [s.take_weight(WEIGHT).tolist() for s in packed] == [[[1, 3], [5, 7]], [[2, 4], [6, 8]]]
    assert packed[1].weight_slices((2, 4)) == ((1, 1, 2), (1, 3, 4))


@pytest.mark.parametrize("style", [Style.ROW, Style.ROW_PACKED])
def test_row_parallel_bias_lives_on_the_first_tp_rank_only(style):
    biases = [shard.take_bias(BIAS) for shard in shards(style, 4, (4,))]
    assert torch.equal(biases[0], BIAS)
    assert biases[1:] == [None, None, None]


@pytest.mark.parametrize("style", list(Style))
def test_a_part_is_contiguous_and_does_not_keep_the_whole_alive(style):
    full = torch.zeros(8, 8)
    part = Shard(style, 1, 2, (4, 4)).take_weight(full)
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    assert part.data_ptr() != full.data_ptr()


@pytest.mark.parametrize(
    ("style", "dim"),
    [(Style.COL, 0), (Style.COL_GATHER, 0), (Style.ROW, 1), (Style.ROW_PACKED, 1), (Style.REPLICATED, None)],
)
def test_each_style_splits_its_dimension(style, dim):
    assert Shard(style, 0, 2).split_dim == dim


@pytest.mark.parametrize(
    ("style", "shape", "blocks"),
    [
        (Style.COL, (3, 4), ()),
        (Style.ROW, (4, 3), ()),
        (Style.ROW_PACKED, (4, 8), (3, 5)),  # the sum is even, the blocks are not
        (Style.ROW_PACKED, (4, 8), (4, 2)),  # the blocks do not make up the width
    ],
)
def test_an_uneven_split_is_refused(style, shape, blocks):
    with pytest.raises(ConfigurationError, match="cannot be split over 2 ranks"):
        Shard(style, 0, 2, blocks).weight_slices(shape)


def test_packed_slices_are_not_plain_row_slices():
    plain, packed = Shard(Style.ROW, 0, 2), Shard(Style.ROW_PACKED, 0, 2, (2, 2))
    assert not torch.equal(plain.take_weight(WEIGHT), packed.take_weight(WEIGHT))


def test_partial_quant_biases_of_a_row_split_layer_add_up():
    """quant_bias = round(bias / deq) - offset * row sum: the row sum is over the columns of all ranks."""
    codes, offset, rounded_bias = torch.tensor([[3, -4, 5, 6]]), 7, torch.tensor([100])
    ranks = shards(Style.ROW, 2)
    parts: list[Tensor | None] = [
        (rounded_bias if s.has_bias else 0) - offset * s.take_weight(codes).sum(1) for s in ranks
    ]
    assert torch.equal(join("l.quant_bias", parts, ranks[0]), rounded_bias - offset * codes.sum(1))


def test_heads_of_fa3_scales_join_like_the_rows_of_the_query_layer():
    ranks = shards(Style.COL, 2)
    full = torch.arange(4.0).reshape(4, 1)
    assert torch.equal(join("attn.fa_q.scale", [s.take("scale", full) for s in ranks], ranks[0]), full)


@pytest.mark.parametrize(
    ("name", "parts", "style", "told"),
    [
        ("l.input_scale", [torch.ones(1), torch.zeros(1)], Style.COL, r"ranks \[1\] hold other values"),
        ("l.weight_scale", [torch.ones(2, 1), torch.zeros(2, 1)], Style.ROW, r"ranks \[1\] hold other values"),
        ("norm.weight", [torch.ones(2), torch.ones(2).half()], Style.REPLICATED, r"ranks \[1\] hold other values"),
        ("l.bias", [BIAS, BIAS], Style.ROW, r"ranks \[0, 1\] hold it"),
        ("l.bias", [None, BIAS], Style.ROW, r"ranks \[1\] hold it"),
        ("l.weight", [WEIGHT, None], Style.COL, r"ranks \[1\] do not have it"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(name, parts, style, told):
    with pytest.raises(VerificationError, match=told):
        join(name, parts, Shard(style, 0, 2))


def test_a_tensor_that_no_rank_has_joins_to_none():
    assert join("l.bias", [None, None], Shard(Style.COL, 0, 2)) is None


def test_an_unknown_tensor_of_a_split_layer_is_refused_and_of_a_replicated_one_is_kept():
    with pytest.raises(InputError, match="mystery"):
        Shard(Style.COL, 0, 2).slices("mystery", (2, 2))
    assert Shard(Style.REPLICATED, 0, 2).slices("mystery", (2, 2)) == ()


def test_cutting_nothing_copies_the_whole():
    whole = cut(WEIGHT, ())
    assert torch.equal(whole, WEIGHT)
    assert whole.data_ptr() != WEIGHT.data_ptr()
