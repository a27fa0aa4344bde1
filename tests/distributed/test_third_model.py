"""A model that the product has never heard of: a package with an entry point, and the whole job runs on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model_adapters import adapter_names
from quant_core.calibration.records import load_dump
from scripts.make_tiny_pipeline import write_prompts
from tests.support import consumer
from tests.support.forked_ranks import run_forked
from tests.support.torchrun import ROOT
from tests.support.toy_model.pipeline import make_toy_pipeline

STEPS, PROMPTS = 4, 4  # prompts of write_prompts
LENGTH = 12


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on which somebody's distribution with the toy model is installed."""
    installed = tmp_path / "site" / "toy_model-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[model_adapters.models]\ntoy = tests.support.toy_model\n")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(installed.parent)])}


@pytest.mark.distributed
def test_the_whole_job_runs_on_two_ranks_and_keeps_what_the_model_makes(environ: dict[str, str], tmp_path: Path):
    words = (
        "-m", "launcher", "toy", "--path", make_toy_pipeline(tmp_path / "toy"), "--device", "cpu",
        "--prompt_path", write_prompts(tmp_path / "prompts.txt"), "--length", str(LENGTH), "--infer_steps", str(STEPS),
        "--do_quant", "--quant_weight_save_folder", tmp_path / "weights",
        "--quant_dump_calib_folder", tmp_path / "dumps", "--do_save_img", "--save_path", tmp_path / "signals",
        "--info_file_save_path", tmp_path / "info.json",
    )  # fmt: skip
    finished = run_forked(2, *words, environ=environ)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        loaded = consumer.load(tmp_path / "weights", rank, "w8a8_timestep")
        consumer.check(loaded, torch.bfloat16, timesteps=STEPS)
        assert len(loaded.quantized_layers) == 15  # 6 in each of 2 blocks and the 3 inputs; the last one stays float
        records = load_dump(tmp_path / "dumps" / f"calib_data_rank{rank}.pth")["records"]
        assert [record["timestep_idx"] for record in records] == [*range(STEPS)] * PROMPTS
    for kind in ("calib_fp", "calib_quant"):
        files = sorted((tmp_path / "signals" / kind).glob("[0-9]*"))
        assert [file.name for file in files] == [f"{prompt}_0.npy" for prompt in range(PROMPTS)]
        assert {np.load(file).shape for file in files} == {(LENGTH, 4)}
    assert consumer.check_manifest(tmp_path / "weights")["fields"]["versions.toy-model"] == "1.0"
    again = run_forked(2, *words, environ=environ)
    assert "published already" in again.stdout


def test_listing_a_strangers_model_imports_neither_it_nor_torch(environ: dict[str, str]):
    program = (
        "import sys; from model_adapters import adapter_names; print(*adapter_names()); "
        "print([name for name in sys.modules if name == 'torch' or name.startswith('tests')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environ}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "flux sd3 toy\n[]\n"


def test_no_model_is_named_in_the_launcher():
    named = re.compile("|".join(adapter_names()), re.IGNORECASE)
    sources = (ROOT / "launcher").rglob("*.py")
    assert [source.name for source in sources if named.search(source.read_text(encoding="utf-8"))] == []
