"""A job whose scheme reads no activations runs without the model: from disk to the shards, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_adapters import load_adapter
from model_adapters.weights.loading import load_transformer
from quant_core import SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from scripts.make_tiny_pipeline import write_prompts
from tests.support.golden_cases import Written, differing
from tests.support.torchrun import run_job

pytestmark = pytest.mark.distributed


def test_two_ranks_stream_the_shards_that_a_held_model_gives_and_calibrate_only_if_needed(
    tiny_flux_folder: Path, tmp_path: Path
):
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    finished = run_job(2, "flux", tiny_flux_folder, write_prompts(tmp_path / "prompts.txt"), tmp_path, *flags)
    assert "w8a8_dynamic reads no activations" in finished.stdout
    assert list((tmp_path / "dumps").iterdir()) == []
    for rank in (0, 1):
        held = _quantize_held(tiny_flux_folder, rank, tmp_path / f"held{rank}")
        streamed = Written.read(tmp_path / "weights", "w8a8_dynamic", suffix=f"_{rank}")
        assert differing(streamed.tensors, held.tensors) == []
        assert streamed.description == held.description


def _quantize_held(folder: Path, tp_rank: int, output: Path) -> Written:
    adapter = load_adapter("flux")
    loaded = load_transformer(
        adapter, str(folder), tp_rank=tp_rank, tp_size=2, dtype=adapter.dtype(adapter.options(path="x")), device="cpu"
    )
    scheme = W8A8DynamicProcessorConfig(disable_names=adapter.disabled_layers["w8a8_dynamic"])
    save = SaveProcessorConfig(output_path=str(output))
    quant_model(loaded.model, SessionConfig(processor_cfg_map={"w8a8_dynamic": scheme, "save": save}))
    return Written.read(output, "w8a8_dynamic")
