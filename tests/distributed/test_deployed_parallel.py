"""Two ranks that compute in integers, each its part, are as close to the float model as one rank is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant_core import quant_model
from quant_core.schemes import SCHEMES
from tests.distributed.deployed_worker import LAYOUTS, STEPS, output, session
from tests.support.tiny_models import build
from tests.support.torchrun import run_torchrun

WORKER = Path(__file__).with_name("deployed_worker.py")
RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the ranks of one torchrun wrote."""
    folder = tmp_path_factory.mktemp("results")
    done = run_torchrun(RANKS, WORKER, str(folder), timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


each_case = pytest.mark.parametrize(
    ("kind", "layout", "scheme"), [(kind, layout, scheme) for kind, layout in LAYOUTS for scheme in SCHEMES]
)


def of_ranks(results: Path, kind: str, layout: str, scheme: str) -> list[dict[str, Tensor]]:
    return [load_file(results / f"{kind}_{layout}_{scheme}_{rank}.safetensors") for rank in range(RANKS)]


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """Signal over quantization noise in dB."""
    wanted, found = wanted.double(), found.double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.mark.distributed
@each_case
def test_the_files_of_each_rank_compute_what_its_quantized_part_computed(results, kind, layout, scheme):
    for found in of_ranks(results, kind, layout, scheme):
        for step in range(STEPS):
            assert torch.equal(found[f"loaded_{step}"], found[f"quantized_{step}"])


@pytest.mark.distributed
@each_case
def test_all_ranks_compute_one_output(results, kind, layout, scheme):
    first, second = of_ranks(results, kind, layout, scheme)
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.distributed
@each_case
def test_a_divided_model_is_as_close_to_the_float_one_as_a_whole_one(results, kind, layout, scheme, tmp_path):
    float_model, whole = build(kind), build(kind)
    quant_model(whole, session(kind, scheme, tmp_path))
    found = of_ranks(results, kind, layout, scheme)[0]
    for step in range(STEPS):
        wanted = output(float_model, kind, step)
        divided, undivided = sqnr(wanted, found[f"quantized_{step}"]), sqnr(wanted, output(whole, kind, step))
        # Measured: 27 to 32 dB, divided 0.8 better to 0.6 worse. A bias counted on every rank, or a partial sum with
        # another rank's scale, would leave next to nothing.
        assert undivided > 25
        assert divided > undivided - 1.5
