"""Scales are quotients on every device; CUDA multiplies with the reciprocal where a tensor is divided by a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.runtime import dynamic_output
from quant_core.arithmetic.scales import asymmetric_scale, fake_quantize_tokens, symmetric_scale
from quant_core.arithmetic.weight_codec import INT8_ROWS

WEIGHT = torch.randn(500, 24, generator=torch.Generator().manual_seed(0))
AMAX = WEIGHT.abs().amax(dim=1, keepdim=True)


class DividesAsCuda(TorchFunctionMode):
    """Multiply with the reciprocal of a divisor that is a plain number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.div, Tensor.__truediv__, torch.div) and isinstance(args[1], int | float):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


COMPUTED: dict[str, Callable[[], Tensor]] = {
    "symmetric": lambda: symmetric_scale(AMAX),
    "asymmetric": lambda: asymmetric_scale(-AMAX, AMAX * 0.3),
    "tokens": lambda: fake_quantize_tokens(WEIGHT),
    "weight": lambda: INT8_ROWS.encode(WEIGHT, AMAX, torch.float32, NUMERICS["float32"]).scale,
    "search": lambda: INT8_ROWS.round_trip(WEIGHT),
    "deployed": lambda: dynamic_output(WEIGHT, {"weight": torch.ones(2, 24).char(), "weight_scale": torch.ones(2, 1)}),
}


@pytest.mark.parametrize("computed", COMPUTED)
def test_a_device_that_divides_in_another_way_makes_the_same_numbers(computed):
    expected = COMPUTED[computed]()
    with DividesAsCuda():
        assert torch.equal(COMPUTED[computed](), expected)


def test_the_other_way_would_be_seen():
    with DividesAsCuda():
        assert not torch.equal(AMAX / 127, AMAX / torch.full_like(AMAX, 127))
