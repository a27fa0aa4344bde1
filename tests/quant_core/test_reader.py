"""A published checkpoint reads back to what was computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_core import TimestepManager, quant_model, schemes
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import ConfigurationError, VerificationError
from tests.support.golden_cases import GOLDEN, GoldenCase
from tests.support.small_model import SCHEMES, STEPS, SmallModel, session
from tests.support.stored import add_attention, add_smoothing, both, damaged, written


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_read_back_computes_what_the_deployed_layer_computed(tmp_path: Path, scheme: str, dtype: torch.dtype):
    model = SmallModel(dtype)
    files = quant_model(model, session(scheme, tmp_path, dtype=dtype)).files
    assert files is not None
    checkpoint, x = open_checkpoint(files), torch.randn(3, 8).to(dtype)
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        assert torch.equal(checkpoint.read_layer("first")(x, step), model.first(x))
    TimestepManager.set_timestep_idx(None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_float_state_dict_is_the_float_model_within_half_a_step_of_each_row(tmp_path: Path, scheme: str):
    files, model = written(tmp_path, scheme), SmallModel()
    state = open_checkpoint(files).float_state_dict()
    wanted = model.state_dict()
    assert set(state) == set(wanted)
    for name in ("first", "second"):
        step_O1 = wanted[f"{name}.weight"].abs().amax(1, keepdim=True) / 127
        error = (state[f"{name}.weight"] - wanted[f"{name}.weight"]).abs()
        assert bool((error <= step_O1 * (0.5 + 1e-4)).all())
    assert all(
        torch.equal(state[name], wanted[name]) for name in wanted if name not in ("first.weight", "second.weight")
    )
    model.load_state_dict(state)


def test_smoothing_is_undone_in_the_float_weight_and_done_in_the_deployed_layer(tmp_path: Path):
    files = written(tmp_path, "w8a8_dynamic")
    plain = open_checkpoint(files)
    plain_weight, layer = plain.read_weight("first"), plain.read_layer("first")
    smoothed = open_checkpoint(damaged(files, add_smoothing))
    factor_I, x = 2.0 ** torch.arange(8), torch.randn(3, 8)
    assert torch.equal(smoothed.read_weight("first"), plain_weight * factor_I)
    assert torch.equal(smoothed.read_layer("first")(x), layer(x * factor_I))
    assert {"first.weight", "first.bias"} <= set(smoothed.float_state_dict())
    assert not any(".div." in name or ".linear." in name for name in smoothed.float_state_dict())


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_every_golden_checkpoint_of_the_reference_tool_reads_back_close_to_its_float_model(name: str):
    case = GoldenCase(name)
    stem = f"{case.scheme}"
    files = CheckpointFiles(
        case.folder / f"quant_model_weight_{stem}.safetensors", case.folder / f"quant_model_description_{stem}.json"
    )
    checkpoint, float_model = open_checkpoint(files), case.model()
    checkpoint.verify()
    parameters = dict(float_model.named_parameters())
    state = checkpoint.float_state_dict()
    assert set(state) == set(parameters)  # reference numerics write no buffers
    for name in checkpoint.inventory.layers:
        wanted, found = parameters[f"{name}.weight"].float(), state[f"{name}.weight"].float()
        # 8 bits a row are 40 dB of a Gaussian one; a factor of smoothing left in or out would leave less than 10.
        assert (wanted - found).norm() < 0.02 * wanted.norm(), name


def test_the_separator_is_the_one_that_was_configured(tmp_path: Path):
    checkpoint = open_checkpoint(written(tmp_path, "w8a8_timestep", timestep_sep=3))
    assert checkpoint.timestep_sep == 3
    assert checkpoint.inventory.timesteps == STEPS


def test_without_a_separator_in_the_header_half_the_steps_are_dynamic(tmp_path: Path):
    files = damaged(written(tmp_path, "w8a8_timestep", timestep_sep=3), lambda t, d: None, metadata={"format": "pt"})
    assert open_checkpoint(files).timestep_sep == STEPS // 2


@pytest.mark.parametrize("separator", ["5", "-1", "two", "²", ""])
def test_a_separator_that_is_no_step_is_refused(tmp_path: Path, separator: str):
    files = damaged(written(tmp_path, "w8a8_timestep"), lambda t, d: None, metadata={"timestep_sep": separator})
    with pytest.raises(VerificationError, match="timestep_sep"):
        open_checkpoint(files)


def test_a_layer_that_is_not_there_is_an_error_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(ConfigurationError) as caught:
        open_checkpoint(written(tmp_path, "w8a8")).read_layer("frist")
    assert "first (nearest name)" in str(caught.value)


def test_opening_reads_no_tensor_and_a_layer_reads_its_own_only(tmp_path: Path):
    files = written(tmp_path, "w8a8")
    files = damaged(files, lambda t, d: t["second.weight_scale"].fill_(-1))
    checkpoint = open_checkpoint(files)
    checkpoint.read_layer("first")
    with pytest.raises(VerificationError, match=r"second\.weight_scale"):
        checkpoint.read_layer("second")


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if schemes.SCHEMES[name].multiplies_input])
def test_what_was_written_verifies_also_smoothed_and_with_attention(tmp_path: Path, scheme: str):
    files = written(tmp_path, scheme)
    checkpoint = open_checkpoint(files)
    checkpoint.verify()
    assert list(checkpoint.inventory.layers) == ["first", "second"]
    changed = open_checkpoint(damaged(files, both(add_attention, add_smoothing)))
    changed.verify()
    assert list(changed.inventory.attentions) == ["attn"]
    assert "shift" in changed.inventory.floats  # a persistent buffer belongs to the checkpoint
