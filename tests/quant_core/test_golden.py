"""`numerics="reference"` writes what the reference tool wrote, tensor by tensor, and in the JSON's order.

The reference ran on another processor, and the last bit of a float matrix product depends on the processor's kernels.
What rests on weights alone is equal anywhere and must be equal here. What rests on activations passes through those
products: the two FLUX bf16 cases come out equal to the last bit on processors with AVX-512; for the others
the measured ranges may be off by the few units in the last place that are stated, and everything derived from the
ranges is checked to the last bit by deriving it from the reference tool's own ranges.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.arithmetic.scales import pack_deq_scale
from tests.support.golden_cases import GoldenCase, Written, differing, needs_avx512

CASES = [
    "sd3_w8a8_bf16",
    "sd3_w8a8_fp32",
    "flux_w8a8_timestep_bf16",
    "flux_w8a8_timestep_fp32",
    "flux_w8a8_dynamic_bf16",
]
FROM_ACTIVATIONS = ("input_scale", "input_offset", "quant_bias", "deq_scale")
# How far a measured scale may be from the reference tool's. bf16: one unit in the last place, 2**-7. fp32: a product
# that is one unit off may flip one code of a fake-quantized layer, which moves the extremes behind it by up to 5.1e-4
# (measured; another kernel of the same processor flips other codes), ...
CLOSE = {torch.bfloat16: 2.0**-7, torch.float32: 1e-3}
# ... but in front of the first such flip, in the first block, only units in the last place are off: 3 measured.
FIRST_BLOCK, VERY_CLOSE = "transformer_blocks.0.", 4 * 2.0**-23


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


@pytest.fixture(scope="module")
def ours(case: GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return case.quantize(tmp_path_factory.mktemp(case.name))


def test_description_and_its_order_are_equal(case: GoldenCase, ours: Written):
    assert ours.description == case.golden.description


def test_what_rests_on_weights_is_bit_equal(case: GoldenCase, ours: Written):
    golden = case.golden.tensors
    assert [name for name in differing(ours.tensors, golden) if not name.endswith(FROM_ACTIVATIONS)] == []
    assert {name: (t.dtype, t.shape) for name, t in ours.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in golden.items()
    }


def test_measured_scales_are_equal_but_for_units_in_the_last_place(case: GoldenCase, ours: Written):
    for name, golden in case.golden.tensors.items():
        if name.endswith("input_scale"):
            early = name.startswith(FIRST_BLOCK) and golden.dtype == torch.float32
            tolerance = VERY_CLOSE if early else CLOSE[golden.dtype]
            assert ((ours.tensors[name] - golden).abs() <= tolerance * golden).all(), name
        if name.endswith("input_offset"):
            assert (ours.tensors[name] - golden).abs().max() <= 1, name


def test_what_rests_on_scales_is_bit_equal_given_the_reference_tools_scales(case: GoldenCase):
    golden = case.golden.tensors
    layers = [name.removesuffix(".input_scale") for name in golden if name.endswith(".input_scale")]
    for layer in layers:
        assert derived_again(layer, golden, NUMERICS["reference"]) == [], layer
    assert len(layers) == (0 if case.scheme == "w8a8_dynamic" else 45 if "flux" in case.name else 44)


@pytest.mark.parametrize(
    "name", [pytest.param("flux_w8a8_timestep_bf16", marks=needs_avx512), "flux_w8a8_dynamic_bf16"]
)
def test_flux_in_bf16_is_bit_equal_to_the_last_tensor(name: str, tmp_path: Path):
    case = GoldenCase(name)
    assert differing(case.quantize(tmp_path).tensors, case.golden.tensors) == []


def test_a_single_bit_of_difference_is_found():
    golden = GoldenCase("flux_w8a8_dynamic_bf16").golden.tensors
    name = "context_embedder.weight_scale"
    broken = dict(golden)
    broken[name] = golden[name].clone()
    broken[name].view(torch.int16)[7] ^= 1
    assert differing(broken, golden) == [name]


def test_a_wrong_offset_is_found_in_what_is_derived_from_it():
    golden = dict(GoldenCase("sd3_w8a8_fp32").golden.tensors)
    layer = "transformer_blocks.0.attn.to_q"
    golden[f"{layer}.input_offset"] = golden[f"{layer}.input_offset"] + 1
    assert derived_again(layer, golden, NUMERICS["reference"]) == ["quant_bias"]


def derived_again(layer: str, golden: dict[str, torch.Tensor], numerics: Numerics) -> list[str]:
    """Name the tensors of a static layer that its own scales, offsets and codes do not lead to."""
    codes, weight_scale = golden[f"{layer}.weight"], golden[f"{layer}.weight_scale"]
    bias = golden.get(f"{layer}.bias")
    scales, offsets = (golden[f"{layer}.{name}"].reshape(-1) for name in ("input_scale", "input_offset"))
    wrong = []
    for row, (scale, offset) in enumerate(zip(scales, offsets)):
        deq_scale = numerics.deq_scale(scale.reshape(1), weight_scale)
        found = {
            "deq_scale": pack_deq_scale(deq_scale, weight_scale.dtype),
            "quant_bias": numerics.quant_bias(bias, deq_scale, codes, offset.reshape(1)),
        }
        stored = {name: golden[f"{layer}.{name}"] for name in found}
        wrong += [
            n for n, t in found.items() if not torch.equal(t, stored[n][row] if stored[n].ndim == 2 else stored[n])
        ]
    return sorted(set(wrong))
