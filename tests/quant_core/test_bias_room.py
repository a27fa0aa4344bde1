"""A bias far larger than its row's weights is computed, not cut off at the ends of int32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import SessionConfig, TimestepManager, open_checkpoint, quant_model
from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS
from quant_core.errors import VerificationError
from tests.support.small_model import SCHEMES, STEPS, SmallModel, records, session

TINY_ROW, BIAS = 3, 1.0
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
static_schemes = pytest.mark.parametrize("scheme", ["w8a8", "w8a8_timestep"])


def model_with_a_tiny_row(dtype: torch.dtype) -> SmallModel:
    model = SmallModel(dtype)
    model.first.weight[TINY_ROW] = torch.linspace(-1e-5, 1e-5, 8)
    model.first.bias[TINY_ROW] = BIAS
    return model


def small_inputs(dtype: torch.dtype) -> list[dict[str, Any]]:
    """The last step has the widest inputs, so the first decides how much room a bias needs."""
    return [record | {"args": [record["args"][0] / 20]} for record in records(dtype)]


def quantized(scheme: str, dtype: torch.dtype, folder: Path | None = None, **options: Any) -> tuple[SmallModel, Any]:
    model, config = model_with_a_tiny_row(dtype), session(scheme, folder, dtype=dtype, **options)
    config = SessionConfig(
        processor_cfg_map=config.processor_cfg_map, calib_data=small_inputs(dtype), numerics=config.numerics
    )
    return model, quant_model(model, config)


@each_dtype
@static_schemes
def test_the_bias_of_a_row_of_tiny_weights_comes_out(tmp_path: Path, scheme: str, dtype: torch.dtype):
    options = {"timestep_sep": 0} if scheme == "w8a8_timestep" else {}
    model, result = quantized(scheme, dtype, tmp_path, **options)
    checkpoint = open_checkpoint(result.files)
    checkpoint.verify()
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        for record in small_inputs(dtype):
            found = model.first(record["args"][0])
            assert (found[..., TINY_ROW].float() - BIAS).abs().max() < 0.005
            assert torch.equal(checkpoint.read_layer("first")(record["args"][0], step), found)
    TimestepManager.set_timestep_idx(None)


@each_dtype
@static_schemes
def test_other_rows_keep_their_codes_and_scales_to_the_last_bit(scheme: str, dtype: torch.dtype):
    tensors = quantized(scheme, dtype)[1].layers["first"].tensors
    weight = model_with_a_tiny_row(dtype).first.weight.detach()
    plain = INT8_ROWS.encode(weight, INT8_ROWS.row_maxima(weight), dtype, NUMERICS["float32"])
    others = [row for row in range(16) if row != TINY_ROW]
    assert torch.equal(tensors["weight"][others], plain.codes[others])
    assert torch.equal(tensors["weight_scale"][others], plain.scale[others])
    assert tensors["weight_scale"][TINY_ROW] > plain.scale[TINY_ROW]
    assert tensors["quant_bias"].abs().max() <= 2**30 + 255 * 127 * 8


def test_the_reference_numerics_keeps_the_scale_and_overflows_and_the_file_says_that_it_may(tmp_path: Path):
    result = quantized("w8a8", torch.float32, tmp_path, numerics="reference")[1]
    tensors = result.layers["first"].tensors
    assert tensors["quant_bias"][TINY_ROW] in (-(2**31), 2**31 - 1)
    assert tensors["weight_scale"][TINY_ROW] == 2.0**-23
    open_checkpoint(result.files).verify()
    # Only the file's own word makes it right: what no numerics is said of must have room.
    stored = load_file(result.files.weights)
    save_file(stored, result.files.weights)
    with pytest.raises(VerificationError, match=r"first.quant_bias' is saturated in 1 of"):
        open_checkpoint(result.files).verify()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_deriving_the_tensors_is_reported_layer_by_layer(scheme: str):
    told: list[tuple[str, int, int]] = []
    quant_model(SmallModel(), session(scheme), progress=lambda *step: told.append(step))
    for stage in ("weights", "derive"):
        assert [step for step in told if step[0] == stage] == [(stage, 1, 2), (stage, 2, 2)]
