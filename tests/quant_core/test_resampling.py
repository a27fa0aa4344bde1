"""A checkpoint with a row for each step serves other steps: its rows are read off between the noise levels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.checkpoint.resampling import Levels, write_resampled
from quant_core.errors import InputError
from tests.support.small_model import STEPS
from tests.support.stored import written

OLD = [1.0, 0.8, 0.5, 0.2]
assert len(OLD) == STEPS


def resampled(folder: Path, new: list[float], dtype: torch.dtype = torch.float32):
    """Write the small model's checkpoint, and its copy with rows at other levels; open both."""
    before = open_checkpoint(written(folder, "w8a8_timestep", dtype=dtype))
    (folder / "new").mkdir()
    files = CheckpointFiles(*(folder / "new" / path.name for path in (before.files.weights, before.files.description)))
    separator = write_resampled(before, Levels(OLD, new), files, {"sigmas": json.dumps(new)})
    after = open_checkpoint(files)
    after.verify()
    assert after.timestep_sep == separator
    return before, after


def test_the_same_levels_give_the_same_rows(tmp_path: Path):
    before, after = resampled(tmp_path, OLD, torch.bfloat16)
    for name in before.inventory.layers:
        old, new = before.read_layer(name).tensors, after.read_layer(name).tensors
        assert list(old) == list(new)
        for key, tensor in old.items():
            assert torch.equal(tensor, new[key]), (name, key)
    assert after.timestep_sep == before.timestep_sep == STEPS // 2


def test_a_level_in_between_has_the_range_in_between(tmp_path: Path):
    before, after = resampled(tmp_path, [1.0, 0.65, 0.2])
    assert after.inventory.timesteps == 3
    old, new = (checkpoint.read_layer("first").tensors for checkpoint in (before, after))
    widths = old["input_scale"][1:3]
    assert new["input_scale"].shape == (3, 1)
    assert new["input_scale"][1].item() == pytest.approx(widths.mean().item(), rel=1e-3)
    assert torch.equal(new["weight"], old["weight"])
    assert new["deq_scale"].shape == (3, 16)
    # The output of the new row is the product of the same weight.
    x, exact = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), before.read_weight("first")
    wanted = x @ exact.T + old["bias"]
    assert (after.read_layer("first")(x, 1) - wanted).norm() / wanted.norm() < 0.05


def test_the_first_static_step_is_as_late_in_the_noise_as_it_was(tmp_path: Path):
    """Half of four steps: from sigma 0.5 on."""
    _, after = resampled(tmp_path, [1.0, 0.9, 0.7, 0.5, 0.3])
    assert after.timestep_sep == 3


@pytest.mark.parametrize("new", [[1.0, 0.1], [1.2, 0.5]])
def test_levels_that_were_not_calibrated_are_refused(tmp_path: Path, new: list[float]):
    with pytest.raises(InputError, match="1 of 2 steps leave the calibrated noise levels") as caught:
        resampled(tmp_path, new)
    assert "4 steps from 1.0000 to 0.2000 were calibrated" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ([1.0, 0.8, 0.8, 0.2], [1.0, 0.2], "the calibrated noise levels do not fall from step to step"),
        (OLD, [1.0, 0.5, 0.5], "the wanted noise levels do not fall"),
        (OLD[:3], [1.0, 0.5], "has 4 rows and names 3 noise levels"),
    ],
)
def test_levels_that_do_not_say_which_row_is_whose_are_refused(old, new, told: str, tmp_path: Path):
    before = open_checkpoint(written(tmp_path, "w8a8_timestep"))
    files = CheckpointFiles(tmp_path / "copy.safetensors", tmp_path / "copy.json")
    with pytest.raises(InputError, match=told):
        write_resampled(before, Levels(old, new), files, {})
    assert not files.weights.exists()
