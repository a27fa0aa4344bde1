"""What breaks one of the consumer's rules is not written, where whoever quantizes asks for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from quant_core.errors import InputError, VerificationError
from quant_core.session.streaming import quantize_streaming
from tests.support.tiny_models import build

KEPT, QUANTIZED = "proj_out", "transformer_blocks.0.attn.to_q"


def held(model: Any, config: SessionConfig, *, checked: bool) -> Any:
    return quant_model(model, config, checked=checked)


def streamed(model: Any, config: SessionConfig, *, checked: bool) -> Any:
    empty = type(model)(**model.config).to(model.dtype).to("meta")
    return quantize_streaming(empty, model.state_dict().__getitem__, config, checked=checked)


def damaged(name: str) -> Any:
    model = build("flux").to(torch.bfloat16)
    with torch.no_grad():
        model.get_submodule(name).bias[3] = float("inf")
    return model


def session(folder: Path) -> SessionConfig:
    save = SaveProcessorConfig(output_path=str(folder))
    return SessionConfig(
        processor_cfg_map={"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=[KEPT]), "save": save}
    )


@pytest.mark.parametrize("quantize", [held, streamed])
@pytest.mark.parametrize("checked", [True, False])
def test_a_bias_that_is_not_finite_is_named_however_it_is_asked_for(
    tmp_path: Path, quantize: Callable[..., Any], checked: bool
):
    with pytest.raises(InputError, match=f"the bias of layer '{QUANTIZED}' holds NaN or infinity"):
        quantize(damaged(QUANTIZED), session(tmp_path), checked=checked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [held, streamed])
def test_a_value_that_breaks_a_rule_is_named_and_nothing_is_written(tmp_path: Path, quantize: Callable[..., Any]):
    with pytest.raises(VerificationError) as error:
        quantize(damaged(KEPT), session(tmp_path), checked=True)
    assert error.value.what == f"'{KEPT}.bias' holds inf at [3]"
    assert error.value.where == str(tmp_path / "quant_model_weight_w8a8_dynamic.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [held, streamed])
def test_a_sound_model_is_written_checked_as_it_is_unchecked(tmp_path: Path, quantize: Callable[..., Any]):
    files = [
        quantize(build("flux"), session(tmp_path / str(checked)), checked=checked).files for checked in (True, False)
    ]
    assert files[0].weights.read_bytes() == files[1].weights.read_bytes()
