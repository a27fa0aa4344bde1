"""FA3 under `numerics="reference"` equals what the reference tool wrote, tensor by tensor, and in the JSON's order.

The reference ran on another processor. How a matrix product in bfloat16 adds up depends on the kernel, and a scale per
token position is the maximum of a few dozen values, so a sum that rounds the other way shows. Measured: with oneDNN's
kernels 13 of the 288 attention scales of this case differ, by at most two units in the last place, on a processor with
AVX-512; with torch's own kernels none does. So equality is asked of one of this processor's kernels, closeness of
both. Without AVX-512 neither set is the reference's: 54 scales differ, all in the last two blocks, and four of
one block by more than two units. There no more than 3 % may.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.golden_cases import HAS_AVX512, GoldenCase, Written, differing, needs_avx512

CASE = GoldenCase("flux_w8a8_dynamic_fa3_bf16")
BF16_ULP = 2.0**-7  # of a number, at most
KERNELS = {"onednn": True, "own": False}
FURTHER = 0 if HAS_AVX512 else 0.03  # of the attention scales


@pytest.fixture(scope="module")
def golden() -> Written:
    """What the reference tool wrote."""
    return CASE.golden


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """What we write, by the kernels of the matrix products."""
    written = {}
    for name, onednn in KERNELS.items():
        with torch.backends.mkldnn.flags(enabled=onednn):
            written[name] = CASE.quantize(tmp_path_factory.mktemp(name))
    return written


@needs_avx512
def test_every_tensor_is_bit_equal_with_one_of_this_processors_kernels(by_kernel, golden):
    assert len(golden.tensors) == 234
    assert any(not differing(ours.tensors, golden.tensors) for ours in by_kernel.values())


def test_description_and_its_order_are_equal(by_kernel, golden):
    assert all(ours.description == golden.description for ours in by_kernel.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_kernel_moves_only_attention_scales_and_by_two_units_in_the_last_place(by_kernel, golden, kernel):
    ours, theirs = by_kernel[kernel].tensors, golden.tensors
    names = [name for name in theirs if ".fa_" in name and name.endswith(".scale")]
    assert set(differing(ours, theirs)) <= set(names)
    off = torch.cat([(ours[name].double() / theirs[name].double() - 1).abs() for name in names])
    assert len(off) == 288
    assert (off > 2 * BF16_ULP).sum() <= FURTHER * len(off)


def test_a_scale_one_bit_off_is_found(golden):
    name = "transformer_blocks.0.attn.fa_q.scale"
    broken = dict(golden.tensors)
    one_bit = torch.zeros_like(broken[name], dtype=torch.int16).index_fill_(0, torch.tensor([0]), 1)
    broken[name] = (broken[name].view(torch.int16) + one_bit).view(torch.bfloat16)
    assert differing(broken, golden.tensors) == [name]


def test_the_better_numerics_is_not_mistaken_for_the_reference(golden, tmp_path: Path):
    ours = CASE.quantize(tmp_path, numerics="float32")
    assert {name for name, _ in ours.description} == {name for name, _ in golden.description}
    # 4 heads; the reference has a scale for each of 24 token positions.
    assert ours.tensors["transformer_blocks.0.attn.fa_q.scale"].shape == (4, 1)
    assert differing(ours.tensors, golden.tensors)
