"""Rotated and unrotated checkpoints of one model have the same weights for `diff`, and say how they differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.job_config import Quantization
from launcher.inspection.difference import difference
from launcher.stages.choose import holding
from launcher.stages.processors import processors, session_of
from quant_core import SaveProcessorConfig, quant_model
from tests.support.tiny_models import build


def _published(folder: Path, **options: bool) -> Path:
    chosen = Quantization(quant_type="w8a8_dynamic", **options)
    save = SaveProcessorConfig(output_path=str(folder))
    quant_model(build("flux"), session_of([*processors(chosen, ()), save], chosen, []))
    return folder


def test_diff_compares_weights_in_the_channels_of_the_float_model(tmp_path: Path):
    found = difference(_published(tmp_path / "a"), _published(tmp_path / "b", rotate_values=True))
    assert len(found.layers) == 12
    assert found.layers["transformer_blocks.0.attn.to_v"] == ("W8A8_DYNAMIC", "W8A8_DYNAMIC, rotated")
    # Both are within half a step of one float weight.
    assert all(ratio.decibels > 35 for ratio in found.weights.values())
    assert found.weights["transformer_blocks.0.attn.to_q"].noise == 0


@pytest.mark.parametrize("rotates", [False, True])
def test_what_auto_chose_is_used_again_with_the_rotation_it_was_measured_with(rotates: bool):
    options = Quantization(quant_type="auto", rotate_values=rotates)
    assert ("rotate_values" in holding(options, {"layer_schemes": {}})) == rotates
