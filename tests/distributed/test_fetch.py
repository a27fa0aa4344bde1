"""A model of the hub comes to a host once, however long that takes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed.fetch_worker import TIMEOUT_S
from tests.support.model_hub import OWNER_AND_NAME, model_hub
from tests.support.torchrun import run_torchrun

pytestmark = pytest.mark.distributed


def test_one_rank_fetches_for_its_host_and_the_others_wait_longer_than_the_time_out(
    tiny_flux_folder: Path, tmp_path: Path
) -> None:
    with model_hub(tiny_flux_folder, seconds=TIMEOUT_S + 2) as hub:
        worker = Path(__file__).with_name("fetch_worker.py")
        finished = run_torchrun(2, worker, environ=hub.environ(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "went on" not in finished.stdout, "for one of the ranks the model is a folder"
    read = dict(re.findall(r"rank (\d) reads (\S+)", finished.stdout))
    assert sorted(read) == ["0", "1"]
    assert read["0"] == read["1"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (Path(read["1"]) / weights).read_bytes() == (tiny_flux_folder / weights).read_bytes()
    fetched = Counter(line for line in hub.asked if line.startswith("GET") and "/resolve/" in line)
    assert f"GET /{OWNER_AND_NAME}/resolve/" in min(fetched)
    assert set(fetched.values()) == {1}
