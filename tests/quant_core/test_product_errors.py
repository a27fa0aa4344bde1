"""A search in blocks, on mixtures of tokens, sees what whole products of all tokens show."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from quant_core.arithmetic import blocks
from quant_core.arithmetic.scales import fake_quantize_tokens
from quant_core.arithmetic.weight_codec import INT8_ROWS
from quant_core.smoothing.product_errors import SAMPLED_OUTPUTS, SKETCH_ROWS, product_errors, sketch


def example(tokens: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return inputs with outlier channels and one outlier token, a weight, and candidates from poor to good."""
    generator = torch.Generator().manual_seed(0)
    x_NI, w_OI = torch.randn(tokens, 96, generator=generator), torch.randn(200, 96, generator=generator)
    x_NI[:, :3] *= 40
    x_NI[tokens // 2] *= 5
    mean_I = x_NI.abs().mean(0)
    return x_NI, w_OI.bfloat16(), [mean_I**power for power in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]


def exhaustive(x_NI: torch.Tensor, w_OI: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    exact, w_OI = F.linear(x_NI, w_OI.float()), w_OI.float()
    found = [F.linear(fake_quantize_tokens(x_NI / f), INT8_ROWS.round_trip(w_OI * f)) for f in factors]
    return torch.stack([(each - exact).square().sum() for each in found])


@pytest.mark.parametrize("block", [200, 2**19])
def test_few_tokens_give_the_very_sums_of_whole_products(block: int, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMEL", block)
    x_NI, w_OI, factors = example(SKETCH_ROWS)
    [found] = product_errors(x_NI, [w_OI], factors, INT8_ROWS, fake_quantize_tokens)
    torch.testing.assert_close(found.errors, exhaustive(x_NI, w_OI, factors), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.exact, F.linear(x_NI, w_OI.float()).square().sum())


def test_many_tokens_are_ranked_as_by_whole_products():
    x_NI, w_OI, factors = example(512)
    [found, _] = product_errors(x_NI, [w_OI, w_OI[:7]], factors, INT8_ROWS, fake_quantize_tokens)
    expected = exhaustive(x_NI, w_OI, factors)
    assert expected[found.errors.argmin()] <= 1.02 * expected.min()
    clear = expected[:, None] > 1.1 * expected  # candidates that differ by less may change places
    assert (found.errors[:, None] > found.errors)[clear].all()
    torch.testing.assert_close(found.errors, expected, rtol=0.2, atol=0)


def test_a_token_that_outshines_all_others_has_its_share_in_the_mixtures():
    x_NI = torch.zeros(512, 4)
    x_NI[77] = 100.0
    torch.testing.assert_close(sketch(x_NI).square().sum(), x_NI.square().sum())


def with_many_outputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the same of a weight whose rows are of very different sizes, heads of 64 and some directions alike."""
    generator = torch.Generator().manual_seed(seed)
    x_NI, _, factors = example(SKETCH_ROWS)
    rows, columns = 7 * SAMPLED_OUTPUTS, x_NI.shape[1]
    w_OI = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(0.7).exp()
    w_OI += 2 * torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    w_OI[(torch.arange(rows) % 64) < 4] *= 3
    return x_NI, w_OI.bfloat16(), factors


@pytest.mark.parametrize("seed", range(4))
def test_some_of_many_outputs_choose_as_well_as_all(seed: int):
    x_NI, w_OI, factors = with_many_outputs(seed)
    [found] = product_errors(x_NI, [w_OI], factors, INT8_ROWS, fake_quantize_tokens)
    expected = exhaustive(x_NI, w_OI, factors)
    assert expected[found.errors.argmin()] <= 1.05 * expected.min()
    torch.testing.assert_close(found.errors / found.errors[0], expected / expected[0], rtol=0.2, atol=0)
    torch.testing.assert_close(found.exact, F.linear(x_NI, w_OI.float()).square().sum(), rtol=0.3, atol=0)
