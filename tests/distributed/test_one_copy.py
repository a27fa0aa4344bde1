"""The ranks of one copy of the model hold the same numbers, also where noise is drawn on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quant_core.calibration.records import load_dump
from scripts.fault_matrix import files_below
from tests.support.tiny_job import run_job

pytestmark = pytest.mark.distributed


def replace_scheduler(model: Path, name: str) -> None:
    """Have a pipeline folder name another scheduler of diffusers."""
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (model / "model_index.json").write_text(json.dumps(index))
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))


def test_a_scheduler_that_draws_noise_publishes_the_same_bytes_in_every_run(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_flux_folder, tmp_path / "model")
    replace_scheduler(model, "FlowMatchLCMScheduler")
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8", "--max_num_prompt", "2")
    made = []
    for out in (tmp_path / "first", tmp_path / "second"):
        run_job(2, "flux", model, prompt_file, out, *flags)
        made.append(files_below(out))
    assert "weights/quant_manifest.json" in made[0]
    assert made[0] == made[1]
    first, other = (load_dump(tmp_path / "first" / "dumps" / f"calib_data_rank{rank}.pth") for rank in (0, 1))
    for mine, theirs in zip(first["records"], other["records"]):
        assert mine["kwargs"]["hidden_states"].equal(theirs["kwargs"]["hidden_states"])
