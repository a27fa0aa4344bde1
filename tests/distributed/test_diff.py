"""`launcher diff` says what two published folders were asked for, what their layers are, and how far apart they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.inspection.difference import difference
from quant_core.errors import InputError
from tests.distributed.corruptions import COL, SMOOTHED, Folder, add_to
from tests.support.golden_cases import GOLDEN

pytestmark = pytest.mark.distributed


def test_a_checkpoint_is_the_same_as_itself(dual_timestep_job, capsys: pytest.CaptureFixture[str]):
    weights = str(dual_timestep_job.folder / "weights")
    parse(["diff", weights, weights]).run(None)
    assert capsys.readouterr().out.endswith("\nthe same\n")


def test_one_code_shows_as_one_tensor_and_in_the_ratio_of_its_layer(dual_timestep_job, tmp_path: Path):
    ours = dual_timestep_job.folder / "weights"
    folder = Folder(shutil.copytree(ours, tmp_path / "weights"), "w8a8_timestep")
    add_to(f"{COL}.weight", 1)(folder)
    found = difference(ours, folder.path)
    assert (found.options, found.layers) == ({}, {})
    assert list(found.tensors) == [f"rank 0: {COL}.weight"]
    assert found.tensors[f"rank 0: {COL}.weight"].startswith("1 of ")
    assert [name for name, ratio in found.weights.items() if ratio.noise] == [COL]


def test_two_schemes_differ_in_options_types_and_a_little_in_their_weights(
    dual_timestep_job, dual_smoothed_job, capsys: pytest.CaptureFixture[str]
):
    folders = [str(job.folder / "weights") for job in (dual_timestep_job, dual_smoothed_job)]
    parse(["diff", *folders, "--json"]).run(None)
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["quantization.quant_type"] == ["w8a8_timestep", "w8a8_dynamic_fa3"]
    assert found["layers"][SMOOTHED] == ["W8A8_TIMESTEP", "W8A8_DYNAMIC, smoothed"]
    assert len(found["layers"]) == 49
    assert found["layers"]["transformer_blocks.0.ff.net.2"] == ["float", "W8A8_DYNAMIC"]
    # Both are within half a step of one float weight; smoothing moves where the steps are.
    assert 35 < found["weights_sqnr_db"][SMOOTHED] < 60
    assert found["weights_sqnr_db"]["norm_out.linear"] == 150


def test_what_is_alike_in_many_layers_is_one_line_and_few_tensors_are_named_each(
    dual_timestep_job, dual_smoothed_job, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    folders = [str(job.folder / "weights") for job in (dual_timestep_job, dual_smoothed_job)]
    parse(["diff", *folders]).run(None)
    said = capsys.readouterr().out
    assert "layers: 49 differ (each one: --json)" in said
    assert "     2 transformer_blocks.*.attn.to_q: W8A8_TIMESTEP -> W8A8_DYNAMIC, smoothed\n" in said
    assert "    90 *.deq_scale: only in A\n" in said
    assert "values differ" in said
    assert "rank 0" not in said
    folder = Folder(shutil.copytree(folders[0], tmp_path / "weights"), "w8a8_timestep")
    add_to(f"{COL}.weight", 1)(folder)
    parse(["diff", folders[0], str(folder.path)]).run(None)
    said = capsys.readouterr().out
    assert "tensors: 1 differs\n" in said
    assert f"  rank 0: {COL}.weight: 1 of " in said


def test_checkpoints_of_other_numbers_of_ranks_are_not_compared(dual_timestep_job):
    with pytest.raises(InputError, match="divided over other numbers of ranks"):
        difference(dual_timestep_job.folder / "weights", GOLDEN / "flux_w8a8_timestep_bf16")
