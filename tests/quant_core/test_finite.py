"""NaN and infinity are refused where they first appear, and never reach a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core import DumperManager, quant_model
from quant_core.errors import InputError
from quant_core.session.streaming import quantize_streaming
from tests.support.golden_cases import GoldenCase
from tests.support.small_model import SCHEMES, STEPS, SmallModel, records, session


def with_number(number: float, record: int) -> list[dict[str, Any]]:
    """Return the records with one number in one of them replaced."""
    changed = records()
    changed[record]["args"][0].view(-1)[3] = number
    return changed


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_timestep"])
def test_a_record_that_is_not_finite_is_named_with_the_layer_that_got_it(scheme: str, number: float, tmp_path: Path):
    config = session(scheme, tmp_path / "out").model_copy(update={"calib_data": with_number(number, record=5)})
    with pytest.raises(InputError, match="layer 'first' got NaN or infinity") as caught:
        quant_model(SmallModel(), config)
    assert "record 5 (step 2)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_overflows_is_named_by_the_layer_behind_it():
    model = SmallModel(torch.float16)
    model.first.weight.data[0] = 6e4
    config = session("w8a8", dtype=torch.float16)
    with pytest.raises(InputError, match="layer 'second' got NaN or infinity") as caught:
        quant_model(model, config)
    assert "record 0" in str(caught.value)
    assert "--dtype bfloat16" in str(caught.value)


@pytest.mark.parametrize("numerics", ["float32", "reference"])
@pytest.mark.parametrize("name", ["sd3_w8a8_fp32", "flux_w8a8_dynamic_m4_fp32", "flux_w8a8_dynamic_fa3_bf16"])
def test_statistics_of_every_kind_refuse_them(name: str, numerics: str, tmp_path: Path):
    case = GoldenCase(name)
    broken = case.records
    arguments = broken[2]["args"] if isinstance(broken[2], dict) else broken[2]
    arguments[0].view(-1)[0] = float("nan")
    config = case.session(tmp_path / "out", numerics=numerics).model_copy(update={"calib_data": broken})
    with pytest.raises(InputError, match="got NaN or infinity") as caught:
        quant_model(case.model(), config)
    assert "record 2" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_not_finite_is_named(scheme: str, tmp_path: Path):
    model = SmallModel()
    model.second.weight.data[2, 3] = float("nan")
    with pytest.raises(InputError, match="the weight of layer 'second' holds NaN or infinity"):
        quant_model(model, session(scheme, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_streamed_weight_that_is_not_finite_leaves_no_file(tmp_path: Path):
    model = SmallModel()
    model.first.weight.data[0, 0] = float("inf")
    state = model.state_dict()
    with pytest.raises(InputError, match="the weight of layer 'first' holds NaN or infinity"):
        quantize_streaming(SmallModel().to("meta"), state.__getitem__, session("w8a8_dynamic", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_that_calls_the_model_with_nan_is_stopped_at_that_call():
    model = SmallModel()
    DumperManager(model)
    model(torch.ones(1, 1, 8))
    with pytest.raises(InputError, match="NaN in its argument 'x'") as caught:
        model(torch.full((1, 1, 8), float("nan")))
    assert "call 1" in str(caught.value)


def test_a_mask_of_infinities_is_captured():
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + mask

    model, mask = Masked(), torch.tensor([0.0, float("-inf")])
    dumper = DumperManager(model)
    model(torch.ones(2), mask)
    assert torch.equal(dumper.records[0][1], mask)


def test_finite_records_of_all_steps_pass():
    assert quant_model(SmallModel(), session("w8a8_timestep")).timesteps == STEPS
