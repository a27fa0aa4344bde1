"""Whoever moves a published value is told to raise the number that keeps jobs from using older ones again.

Only values that every processor computes alike are looked at: extremes, quotients, roundings and sums of integers.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.files.digests import digest_of_text
from quant_core import quant_model
from quant_core.schemes import SCHEMES
from quant_core.tensor_bytes import digest_of_tensor
from quant_core.values import VALUES_VERSION
from tests.support.small_model import SmallModel, session

# By version, scheme and dtype, the digest of what a layer is published as.
PUBLISHED: dict[int, dict[str, str]] = {
    1: {
        "w8a8 float32": "3d7933c9a0ae3185",
        "w8a8 bfloat16": "ea9af95fc7eba9aa",
        "w8a8_timestep float32": "de45e4f79beeedbd",
        "w8a8_timestep bfloat16": "82a71eec70547743",
        "w8a8_dynamic float32": "ffa7f5f9d4112196",
        "w8a8_dynamic bfloat16": "51328d04d5674ded",
        "w8a16 float32": "ffa7f5f9d4112196",
        "w8a16 bfloat16": "51328d04d5674ded",
    },
}


def plain_numbers(shape: torch.Size, start: int) -> Tensor:
    """Return fractions that need no random numbers, which processors draw otherwise in the last bit."""
    index = torch.arange(shape.numel()) + start
    return ((index * 37) % 101 - 50).reshape(shape) / 96


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_published_values_are_those_of_their_version(scheme: str, dtype: str, tmp_path):
    model, starts = SmallModel(), count(step=7)
    for parameter in model.parameters():
        parameter.data = plain_numbers(parameter.shape, next(starts))
    asked = session(scheme, tmp_path, dtype=getattr(torch, dtype), disable_names=["second", "last"])
    for record in asked.calib_data:
        record["args"] = [plain_numbers(each.shape, next(starts)).to(each.dtype) for each in record["args"]]
    files = quant_model(model.to(getattr(torch, dtype)), asked).files
    assert files is not None
    stored = sorted((name, tensor) for name, tensor in load_file(files.weights).items() if name.startswith("first."))
    found = digest_of_text(repr([(name, digest_of_tensor(tensor)) for name, tensor in stored]))[:16]
    expected = PUBLISHED.get(VALUES_VERSION, {}).get(f"{scheme} {dtype}")
    assert found == expected, f"other values: raise VALUES_VERSION, and note '{scheme} {dtype}': '{found}'"
