"""m3, m4 and m6 under `numerics="reference"` give what the reference tool wrote, on any processor.

Equality to the last bit takes the reference's kernels (`test_golden_exactly.py`). Elsewhere factors, which come from
activations, depend on the processor in one place more than in the last bit of a sum: the sinusoidal embedding
multiplies 128 frequencies by a timestep of up to 1000, so a frequency that is one unit in the last place off (what
`exp` may be) moves the phase by up to 6e-5. Codes and scales are checked to the last bit from the golden factors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_adapters.flux.structure import STRUCTURE
from quant_core import quant_model
from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS
from tests.support.golden_cases import GoldenCase, Written, differing

METHODS = ("m3", "m4", "m6")
# Largest distance of a factor or a scale from the golden one, in units in the last place; measured with MKL's kernels
# for other makers' processors: 1436 (m3: the mean of one call is small in some channels), 213 and 273, relative 1.7e-4
# and 3e-5.
UNITS_OF_ANY_MACHINE = 4096


def quantize(case: GoldenCase, folder: Path) -> Written:
    """Quantize the case's float model as the reference tool did."""
    quant_model(case.model(), case.session(folder, numerics="reference"), structure=STRUCTURE)
    return Written.read(folder, case.scheme)


def units(ours: Tensor, golden: Tensor) -> int:
    """Return the largest distance of two positive float32 tensors, counted in representable numbers."""
    return int((ours.view(torch.int32) - golden.view(torch.int32)).abs().max())


def farthest(ours: Written, golden: Written) -> int:
    """Return the largest distance of a factor or a weight scale from the golden one."""
    names = [name for name in differing(ours.tensors, golden.tensors) if name.endswith(("mul_scale", "weight_scale"))]
    return max((units(ours.tensors[name], golden.tensors[name]) for name in names), default=0)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(method: str) -> GoldenCase:
    return GoldenCase(f"flux_w8a8_dynamic_{method}_fp32")


@pytest.fixture(scope="module")
def ours(case: GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return quantize(case, tmp_path_factory.mktemp(case.name))


def test_description_and_its_order_are_equal(case: GoldenCase, ours: Written):
    assert ours.description == case.golden.description


def test_only_smoothed_layers_differ_at_all(case: GoldenCase, ours: Written):
    golden = case.golden.tensors
    smoothed = {name.removesuffix(".div.mul_scale") for name in golden if name.endswith(".div.mul_scale")}
    assert len(smoothed) == 20  # in each of 2 blocks: 2 x 3 projections, 2 outputs, 2 feed-forwards
    tails = ("div.mul_scale", "linear.weight_scale", "linear.weight")
    assert set(differing(ours.tensors, golden)) <= {f"{name}.{tail}" for name in smoothed for tail in tails}
    assert {n: (t.dtype, t.shape) for n, t in ours.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in golden.items()
    }


def test_a_code_differs_only_where_a_weight_lies_between_two(case: GoldenCase, ours: Written):
    names = [name for name in case.golden.tensors if name.endswith(".linear.weight")]
    distance = torch.cat([(ours.tensors[n].int() - case.golden.tensors[n].int()).abs().flatten() for n in names])
    assert distance.max() <= 1
    # A factor that is 1e-6 off moves a quotient of up to 127 by up to 1e-4, so up to one code in ten thousand may be
    # rounded the other way; 15 of these 262144 measured.
    assert distance.sum() <= 26


def test_factors_differ_by_what_the_phase_explains(case: GoldenCase, ours: Written):
    assert farthest(ours, case.golden) <= UNITS_OF_ANY_MACHINE


def test_codes_and_scales_follow_from_the_reference_tools_own_factors(case: GoldenCase):
    golden, model, reference = case.golden.tensors, case.model(), NUMERICS["reference"]
    layers = [name.removesuffix(".div.mul_scale") for name in golden if name.endswith(".div.mul_scale")]
    for layer in layers:
        w_OI = model.get_submodule(layer).weight.detach() * (1 / golden[f"{layer}.div.mul_scale"])
        weight = INT8_ROWS.encode(w_OI, w_OI.abs().amax(1, keepdim=True), torch.float32, reference)
        assert torch.equal(weight.codes, golden[f"{layer}.linear.weight"]), layer
        # The factor was inverted to be stored and inverted again here: one unit for each, and one for the product.
        assert units(weight.scale, golden[f"{layer}.linear.weight_scale"]) <= 3, layer


@pytest.mark.parametrize(("asked", "written"), [("m4", "m6"), ("m6", "m4"), ("m3", "m4")])
def test_another_method_is_not_mistaken_for_the_golden_one(asked: str, written: str, tmp_path: Path):
    ours = quantize(GoldenCase(f"flux_w8a8_dynamic_{asked}_fp32"), tmp_path)
    golden = GoldenCase(f"flux_w8a8_dynamic_{written}_fp32").golden
    assert farthest(ours, golden) > 100 * UNITS_OF_ANY_MACHINE


def test_a_factor_of_one_channel_that_is_off_is_found():
    golden = GoldenCase("flux_w8a8_dynamic_m4_fp32").golden
    name = "transformer_blocks.0.attn.to_q.div.mul_scale"
    broken = Written(dict(golden.tensors), golden.description)
    broken.tensors[name] = golden.tensors[name].clone()
    broken.tensors[name][5] *= 1 + 1e-3
    assert differing(broken.tensors, golden.tensors) == [name]
    assert farthest(broken, golden) > UNITS_OF_ANY_MACHINE
