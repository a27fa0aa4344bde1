"""The command lines that a person has of the reference tool start a job; `test_documents` runs the programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.make_tiny_pipeline import PROMPTS
from tests.support.forked_ranks import run_forked
from tests.support.reference_names import published
from tests.support.torchrun import ROOT, run_torchrun

# How the documents of the reference tool start it; only the device, the size and the number of steps are smaller.
SMALL = ("--width", "64", "--height", "64", "--infer_steps", "2", "--seed", "42", "--device", "cpu")
FLUX_WORDS = (*SMALL, "--device_id", "0", "--use_cache", "--device_type", "A2-64g", "--batch_size", "1")
FLUX_WORDS += ("--max_num_prompt", "0", "--do_quant")
SD3_WORDS = (*SMALL, "--do_quant", "--quant_type", "w8a8")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Return two prompts, one for each data-parallel rank, in a file with the mode that is asked for."""
    path = tmp_path / "calib_prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:2]))
    path.chmod(0o640)
    return path


def command_line(script: str, pipeline: Path, prompts: Path, out: Path, *words: str) -> list[str | Path]:
    """Return the words after `python`; everything they write goes below `out`."""
    model_flag = "--sd3_model_path" if script.startswith("sd3") else "--path"
    folders = ("--quant_weight_save_folder", out / "safetensors", "--quant_dump_calib_folder", out / "cache")
    inputs = (model_flag, pipeline, "--prompt_path", prompts, "--save_path", out / "images")
    return [ROOT / "scripts" / script, *inputs, *words, *folders]


def run_python(*words: str | Path, cwd: Path) -> None:
    """Run a script in another folder than the repository's, as people do."""
    # A thread that waits shall sleep: by default it spins, which costs a minute where other tests share the cores.
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_flux_command_runs_as_it_is_documented(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    words = (*FLUX_WORDS, "--quant_type", "w8a8_timestep")
    run_python(*command_line("inference_flux.py", tiny_flux_folder, prompt_file, tmp_path, *words), cwd=tmp_path)
    assert not published(tmp_path / "safetensors", "w8a8_timestep").inventory.attentions
    assert (tmp_path / "cache" / "calib_data.pth").is_file()


@pytest.mark.distributed
def test_the_flux_command_with_scales_of_attention_does_as_it_is_documented(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    words = (*FLUX_WORDS, "--quant_type", "w8a8_dynamic_fa3")
    done = run_forked(1, *command_line("inference_flux.py", tiny_flux_folder, prompt_file, tmp_path, *words))
    assert done.returncode == 0, done.stderr
    assert published(tmp_path / "safetensors", "w8a8_dynamic").inventory.attentions
    assert (tmp_path / "cache" / "calib_data.pth").is_file()


def test_the_sd3_command_runs_as_it_is_documented(tiny_sd3_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    run_python(*command_line("sd3_inference.py", tiny_sd3_folder, prompt_file, tmp_path, *SD3_WORDS), cwd=tmp_path)
    assert published(tmp_path / "safetensors", "w8a8").inventory.layers


@pytest.mark.distributed
def test_the_flux_command_with_outlier_suppression_runs_under_torchrun(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    words = (*FLUX_WORDS, "--quant_type", "w8a8_dynamic", "--anti_method", "m4")
    done = run_torchrun(2, *command_line("inference_flux.py", tiny_flux_folder, prompt_file, tmp_path, *words))
    assert done.returncode == 0, done.stderr
    # A2-64g is one card for each copy of the model: two ranks share the prompts, and there is one shard.
    layers = published(tmp_path / "safetensors", "w8a8_dynamic").inventory.layers
    assert any("mul_scale" in group.members for group in layers.values())
