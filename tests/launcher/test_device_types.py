"""One card with room for the model and one without publish the same checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.config.resolve import job_config
from launcher.run import run
from tests.support.golden_cases import Written, differing


def publish(device_type: str, folder: Path, prompts: Path, out: Path) -> Written:
    pipeline = {"path": str(folder), "prompt_path": str(prompts), "device_type": device_type}
    tree = {
        "pipeline": pipeline | {"width": 64, "height": 64, "infer_steps": 2, "max_num_prompt": 2, "batch_size": 2},
        "quantization": {"do_quant": True, "quant_type": "w8a8_timestep"},
        "ranks": {"device": "cpu"},
        "output": {"quant_weight_save_folder": out / "weights", "quant_dump_calib_folder": out / "dumps"},
    }
    run(job_config("flux", tree))
    return Written.read(out / "weights", "w8a8_timestep")


def test_offloading_block_by_block_changes_nothing(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    whole = publish("A2-64g", tiny_flux_folder, prompt_file, tmp_path / "64g")
    offloaded = publish("A2-32g-single", tiny_flux_folder, prompt_file, tmp_path / "32g")
    assert differing(whole.tensors, offloaded.tensors) == []
    assert whole.description == offloaded.description


def test_a_job_takes_no_library_from_the_process_that_calls_it(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # making the pipeline imported it
    before = {name for name, module in sys.modules.items() if module is None}
    publish("A2-64g", tiny_flux_folder, prompt_file, tmp_path)
    assert {name for name, module in sys.modules.items() if module is None} == before
