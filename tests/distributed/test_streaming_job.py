"""A job whose scheme reads no activations runs without the model: from disk to the shards, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_adapters import load_adapter
from model_adapters.weights.brought import Brought, LoraFile
from model_adapters.weights.loading import load_transformer
from quant_core import SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from scripts.make_tiny_pipeline import write_prompts
from tests.support.forked_ranks import run_forked
from tests.support.golden_cases import Written, differing
from tests.support.tiny_job import assert_sound, run_job

pytestmark = pytest.mark.distributed


def test_two_ranks_stream_the_shards_that_a_held_model_gives_and_calibrate_only_if_needed(
    tiny_flux_folder: Path, tmp_path: Path
):
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    finished = run_job(2, "flux", tiny_flux_folder, write_prompts(tmp_path / "prompts.txt"), tmp_path, *flags)
    assert "w8a8_dynamic reads no activations" in finished.stdout
    assert list((tmp_path / "dumps").glob("calib_data*")) == []
    for rank in (0, 1):
        held = _quantize_held(tiny_flux_folder, rank, tmp_path / f"held{rank}")
        streamed = Written.read(tmp_path / "weights", "w8a8_dynamic", suffix=f"_{rank}")
        assert differing(streamed.tensors, held.tensors) == []
        assert streamed.description == held.description


def test_the_first_job_of_the_help_needs_a_model_and_nothing_else(tiny_flux_folder: Path, tmp_path: Path):
    places = ("--quant_weight_save_folder", tmp_path / "w", "--quant_dump_calib_folder", tmp_path / "c")
    asked = ("flux", "--config", "quality", "--path", tiny_flux_folder, "--tp_size", "2", "--device", "cpu")
    finished = run_forked(2, "-m", "launcher", *asked, *places)
    assert finished.returncode == 0, finished.stderr
    assert_sound(tmp_path / "w")
    assert json.loads((tmp_path / "w" / "quant_manifest.json").read_text())["fields"]["prompts.count"] == 0


def _quantize_held(folder: Path, tp_rank: int, output: Path) -> Written:
    adapter = load_adapter("flux")
    loaded = load_transformer(
        adapter, str(folder), tp_rank=tp_rank, tp_size=2, dtype=adapter.dtype(adapter.options(path="x")), device="cpu"
    )
    scheme = W8A8DynamicProcessorConfig(disable_names=adapter.disabled_layers["w8a8_dynamic"])
    save = SaveProcessorConfig(output_path=str(output))
    quant_model(loaded.model, SessionConfig(processor_cfg_map={"w8a8_dynamic": scheme, "save": save}))
    return Written.read(output, "w8a8_dynamic")


def test_a_job_with_loras_publishes_what_a_job_on_the_fused_transformer_publishes(
    tiny_flux_folder: Path, tmp_path: Path
):
    adapter, prompts = load_adapter("flux"), write_prompts(tmp_path / "prompts.txt")
    lora = LoraFile(_write_lora(tmp_path / "lora.safetensors"), 0.5)
    fused = load_transformer(
        adapter, str(tiny_flux_folder), dtype=torch.bfloat16, device="cpu", brought=Brought(loras=(lora,))
    )
    save_file(fused.model.state_dict(), tmp_path / "fused.safetensors")
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    for name, brought in (
        ("lora", ("--lora", f"{lora.path}:{lora.scale}")),
        ("file", ("--transformer", tmp_path / "fused.safetensors")),
    ):
        run_job(2, "flux", tiny_flux_folder, prompts, tmp_path / name, *flags, *brought)
    for rank in (0, 1):
        lora_files, single = (
            Written.read(tmp_path / name / "weights", "w8a8_dynamic", suffix=f"_{rank}") for name in ("lora", "file")
        )
        assert differing(lora_files.tensors, single.tensors) == []
    fields = json.loads((tmp_path / "lora" / "weights" / "quant_manifest.json").read_text())["fields"]
    assert fields["files.--lora 0"].endswith(" x 0.5")


def _write_lora(path: Path) -> Path:
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 64), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    save_file(factors, path)
    return path
