"""The launcher on `--device cuda`, where there is a GPU: what it publishes there beside what a processor publishes.

Not part of the whole run, which has to pass everywhere: `python -m pytest tests/cuda`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.scales import fake_quantize_tokens
from quant_core.arithmetic.weight_codec import INT8_ROWS
from scripts.make_tiny_pipeline import write_prompts
from tests.support.tiny_job import run_job
from tests.support.torchrun import run_torchrun, start_launcher

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.distributed,
    pytest.mark.timeout(300),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STREAMED = ("--quant_type", "w8a8_dynamic", "--calibrate", "needed")


def difficult_weight(dtype: torch.dtype) -> torch.Tensor:
    """Rows of many sizes: of scales that are subnormal in float16, of zeros, and of quotients between two codes."""
    w_OI = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    w_OI *= torch.logspace(-7, 3, 64).unsqueeze(1)
    w_OI[1] = 0.0
    w_OI[2] = torch.arange(96) - 47.5
    w_OI[2, 0] = 127.0
    return w_OI.to(dtype)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_card_makes_the_codes_and_scales_of_a_processor_to_the_last_bit(dtype, numerics):
    w_OI = difficult_weight(dtype)
    amax_O1 = INT8_ROWS.row_maxima(w_OI)
    assert torch.equal(INT8_ROWS.row_maxima(w_OI.cuda()).cpu(), amax_O1)
    expected = INT8_ROWS.encode(w_OI, amax_O1, dtype, NUMERICS[numerics])
    made = INT8_ROWS.encode(w_OI.cuda(), amax_O1.cuda(), dtype, NUMERICS[numerics])
    assert torch.equal(made.codes.cpu(), expected.codes)
    assert torch.equal(made.scale.cpu(), expected.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_card_quantizes_tokens_as_a_processor_does(dtype):
    x_NI = difficult_weight(dtype)
    assert torch.equal(fake_quantize_tokens(x_NI.cuda()).cpu(), fake_quantize_tokens(x_NI))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


# Over NCCL, and on one card that two ranks share, which NCCL refuses.
@pytest.mark.parametrize(("ranks", "device_type"), [(1, "A2-64g"), (2, "A2-32g-dual")])
def test_a_streamed_job_publishes_the_files_of_a_processor(ranks, device_type, tiny_flux_folder, prompts, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        flags = (*STREAMED, "--device_type", device_type, "--device", device)
        run_job(ranks, "flux", tiny_flux_folder, prompts, tmp_path / device, *flags, start=run_torchrun)
        found[device] = published(tmp_path / device)
    for kind in ("tensors", "descriptions"):
        assert found["cuda"][kind].keys() == found["cpu"][kind].keys()
    torch.testing.assert_close(found["cuda"]["tensors"], found["cpu"]["tensors"], rtol=0, atol=0)
    assert found["cuda"]["descriptions"] == found["cpu"]["descriptions"]
    assert len(found["cpu"]["tensors"]) == len(found["cpu"]["descriptions"]) == ranks


@pytest.mark.parametrize("calibrate", ["always", "online"])
@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_a_static_job_publishes_the_codes_of_a_processor_and_nearly_its_ranges(
    model, calibrate, tiny_flux_folder, tiny_sd3_folder, prompts, tmp_path
):
    folder = tiny_flux_folder if model == "flux" else tiny_sd3_folder
    tensors = {}
    for device in ("cpu", "cuda"):
        flags = ("--quant_type", "w8a8", "--calibrate", calibrate, "--device", device)
        # The pipeline's first noise is drawn on the host for both, so the inputs are the same up to rounding.
        run_job(1, model, folder, prompts, tmp_path / device, *flags, start=run_torchrun)
        [path] = (tmp_path / device / "weights").glob("*.safetensors")
        tensors[device] = load_file(path)
    assert tensors["cuda"].keys() == tensors["cpu"].keys()
    assert any(name.endswith("input_scale") for name in tensors["cpu"])
    for name, expected in tensors["cpu"].items():
        made = tensors["cuda"][name]
        if name.endswith("input_scale"):
            torch.testing.assert_close(made.float(), expected.float(), rtol=0.1, atol=0, msg=name)
        elif expected.dtype == torch.int8 and name.endswith(".weight"):
            assert torch.equal(made, expected), name


def test_a_killed_rank_on_a_card_ends_the_job_and_is_named(tiny_flux_folder, prompts, tmp_path):
    words = ["--nproc_per_node", "2", "flux", "--path", tiny_flux_folder, "--device", "cuda", "--prompt_path", prompts]
    words += ["--width", "64", "--height", "64", "--infer_steps", "200", "--device_type", "A2-32g-dual", "--do_quant"]
    words += ["--quant_weight_save_folder", tmp_path / "weights", "--quant_dump_calib_folder", tmp_path / "dumps"]
    launcher = start_launcher(*words, "--quant_type", "w8a8")
    try:
        os.kill(pid_of_rank(1, launcher.pid, tmp_path / "weights"), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 6, said
    assert "rank 1" in said
    assert "SIGKILL" in said


def pid_of_rank(rank: int, launcher: int, weights: Path) -> int:
    """Wait until the job calibrates, and return the process of a rank."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        log = weights / "logs" / f"rank{rank}.jsonl"
        if log.is_file() and '"calibrate"' in log.read_text():
            for process in psutil.Process(launcher).children(recursive=True):
                if process.environ().get("RANK") == str(rank):
                    return process.pid
        time.sleep(0.1)
    raise AssertionError("the job never calibrated")


def published(out: Path) -> dict[str, dict[str, Any]]:
    """Return the tensors of a job's shards, and its descriptions, by file."""
    weights = out / "weights"
    return {
        "tensors": {path.name: load_file(path) for path in weights.glob("*.safetensors")},
        "descriptions": {p.name: json.loads(p.read_text()) for p in weights.glob("quant_model_description_*.json")},
    }
