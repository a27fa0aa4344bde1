"""The blocked kernel of the benchmark's floor computes what the quantizer computes, to the last bit."""

from __future__ import annotations

import pytest
import torch

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS
from scripts.bench import kernel
from scripts.bench.kernel import Workspace, quantize_rows, row_codes, row_maxima, stored_scale

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 96


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows make a block, so that 50 rows are several blocks and a rest."""
    monkeypatch.setattr(kernel, "BLOCK_NUMEL", 7 * COLUMNS)


def difficult_weight(dtype: torch.dtype) -> torch.Tensor:
    """Rows of ordinary numbers, of zeros, of one number, of the smallest ones, and with ties between two codes."""
    w_OI = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(0))
    w_OI[1] = 0.0
    w_OI[2] = -0.75
    w_OI[3] *= 2e-5  # a scale that is subnormal in float16
    w_OI[4] = torch.arange(COLUMNS) - 47.5  # the quotients are halves: round half to even
    w_OI[4, 0] = 127.0
    w_OI[5] *= 1e4
    # Across the scales at which float16's subnormals round up and down.
    w_OI[10:40] *= torch.logspace(-7, -3, 30).unsqueeze(1)
    return w_OI.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_the_quantizer_to_the_last_bit(dtype):
    w_OI = difficult_weight(dtype)
    expected = INT8_ROWS.encode(w_OI, w_OI.abs().amax(1, keepdim=True), dtype, NUMERICS["float32"])
    codes_OI = torch.empty(w_OI.shape, dtype=torch.int8)
    scale_O1 = quantize_rows(w_OI, codes_OI, Workspace.of(COLUMNS, 0))
    assert scale_O1.dtype == dtype
    assert torch.equal(scale_O1, expected.scale)
    assert torch.equal(codes_OI, expected.codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima_and_codes_in_two_passes_are_the_same_for_shared_scales(dtype):
    w_OI, work = difficult_weight(dtype), Workspace.of(COLUMNS, 0)
    amax_O1 = torch.empty(len(w_OI), 1)
    row_maxima(w_OI, amax_O1, work)
    assert torch.equal(amax_O1, w_OI.abs().amax(1, keepdim=True).float())
    # Another rank's rows reach further.
    shared_O1 = amax_O1 * torch.linspace(1, 3, len(w_OI)).unsqueeze(1)
    shared_O1 = shared_O1.to(dtype).to(torch.float32)
    expected = INT8_ROWS.encode(w_OI, shared_O1.to(dtype), dtype, NUMERICS["float32"])
    scale_O1, codes_OI = stored_scale(shared_O1, dtype), torch.empty(w_OI.shape, dtype=torch.int8)
    row_codes(w_OI, scale_O1.to(torch.float32), codes_OI, work)
    assert torch.equal(scale_O1, expected.scale)
    assert torch.equal(codes_OI, expected.codes)


def test_a_row_with_a_number_that_is_none_has_a_maximum_that_is_none():
    w_OI = torch.randn(20, COLUMNS)
    w_OI[3, 5], w_OI[11, 0] = torch.nan, torch.inf
    amax_O1 = torch.empty(20, 1)
    row_maxima(w_OI, amax_O1, Workspace.of(COLUMNS, 0))
    assert (~amax_O1.isfinite()).flatten().nonzero().flatten().tolist() == [3, 11]
