"""A job of two ranks, from the command line to shards, each of which the real MindIE-SD loads on its own rank."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.inspection import with_runtime
from launcher.inspection.verify import verify
from quant_core.errors import EnvironmentFailure
from scripts.make_tiny_pipeline import write_prompts
from tests.runtime.cases import Answer, Case, described_classes, run_cases
from tests.runtime.files import changed_copy
from tests.runtime.product import CheckpointFiles, files_in, read_manifest, run_forked

pytestmark = pytest.mark.distributed

TYPE = "W8A8_TIMESTEP"
STEPS = 2  # one dynamic, one static
RANKS = (0, 1)
# Column-split, with a bias on both ranks; row-split, with one on the first.
COLUMN, ROW = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"


@pytest.fixture(scope="module")
def shards(packages: Path, tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the smallest FLUX job that publishes a shard for each of two ranks, and return the folder of the shards."""
    folder = tmp_path_factory.mktemp("job")
    model = ["flux", "--path", tiny_flux_folder, "--device", "cpu", "--device_type", "A2-32g-dual"]
    prompts = ["--prompt_path", write_prompts(folder / "prompts.txt"), "--max_num_prompt", "1"]
    sizes = ["--width", "64", "--height", "64", "--infer_steps", str(STEPS)]
    folders = ["--quant_weight_save_folder", folder / "weights", "--quant_dump_calib_folder", folder / "dumps"]
    quantization = ["--do_quant", "--quant_type", TYPE.lower()]
    words = map(str, [*model, *prompts, *sizes, *quantization, *folders])
    finished = run_forked(2, "-m", "launcher", *words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "weights"


def files_of(folder: Path, rank: int) -> CheckpointFiles:
    return files_in(folder, TYPE, rank)


def as_it_is(tensors: dict[str, Tensor]) -> None:
    pass


def changed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{COLUMN}.deq_scale"][-1, 3] *= 1.03


# Of each rank's copy.
CHANGES = (as_it_is, changed)


@pytest.fixture(scope="module")
def answers(
    shards: Path, packages: Path, tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Answer]]:
    """Load the shards as they are, with the manifest's line, and with one scale of rank 1 changed."""
    manifest = read_manifest(shards / "quant_manifest.json")
    assert manifest is not None
    assert manifest.timestep_policy is not None
    published = Case(
        str(files_of(shards, 0).description),
        "bfloat16",
        "flux",
        {TYPE: str(shards)},
        pipeline=str(tiny_flux_folder),
        registration=manifest.timestep_policy.registration["3.1"],
    )
    folder = tmp_path_factory.mktemp("answers")
    first, _ = (
        changed_copy(files_of(shards, rank), folder / "changed", change) for rank, change in zip(RANKS, CHANGES)
    )
    cases = {"published": published, "changed": replace(published, description=str(first))}
    return run_cases(cases, packages, folder, ranks=2)


@pytest.mark.parametrize("rank", RANKS)
def test_each_rank_loads_its_own_shard_and_every_layer_agrees(
    rank: int, shards: Path, answers: list[dict[str, Answer]]
) -> None:
    answer = answers[rank]["published"]
    assert answer.error == ""
    assert answer.classes == described_classes(files_of(shards, rank).description)
    assert len(answer.layers) == 45  # 50 linears of the tiny FLUX less 4 net.2 and the last
    assert answer.disagreeing == []


def test_the_shards_of_two_ranks_are_not_the_same(shards: Path) -> None:
    """So that a rank that loaded the other's would have been found."""
    weights = [load_file(files_of(shards, rank).weights)[f"{COLUMN}.weight"] for rank in RANKS]
    assert not torch.equal(*weights)


def test_the_line_in_the_manifest_makes_the_second_half_of_the_steps_static(answers: list[dict[str, Answer]]) -> None:
    assert [answer["published"].strategies for answer in answers] == [["dynamic", "static"]] * 2


def test_a_row_split_layer_has_its_bias_on_the_first_rank_only(answers: list[dict[str, Answer]]) -> None:
    """The loader reads a bias where the model has one, whatever the file holds: both have to say the same."""
    assert [ROW in answers[rank]["published"].biases for rank in RANKS] == [True, False]
    assert [COLUMN in answers[rank]["published"].biases for rank in RANKS] == [True, True]


def test_one_changed_scale_is_found_on_its_rank_and_no_other(answers: list[dict[str, Answer]]) -> None:
    assert [answer["changed"].disagreeing for answer in answers] == [[], [COLUMN]]


def test_the_command_has_the_runtime_load_and_compute_each_rank_without_the_model(
    shards: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch_npu is installed and CANN is not."""
    (tmp_path / "torch_npu.py").write_text('raise ImportError("libhccl.so: cannot open shared object file")')
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # hidden here, as the command hides it
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(packages)
    verdict = verify(shards, with_runtime=True)
    assert verdict.findings == []
    assert "loaded the files and computed with 90 layers" in verdict.remarks[-1]  # 45 on each rank
    # 0.00 where the processor adds up as the stand-in does; one output that rounds the other way is 0.93.
    assert re.search(r"largest difference (0\.\d\d|1\.00) of what rounding may make", verdict.remarks[-1])


def test_what_the_runtime_refuses_is_a_finding_in_its_own_words(
    shards: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(packages)
    folder = shutil.copytree(shards, tmp_path / "weights")
    files_of(folder, 1).weights.chmod(0o644)
    found = [(each.rule, each.file.name) for each in verify(folder, with_runtime=True).findings]
    assert found == [(rule, files_of(folder, 1).weights.name) for rule in ("mode", "the runtime loads")]


def test_a_runtime_that_does_not_end_is_an_error_that_says_so(
    shards: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(with_runtime, "_TIMEOUT_S", 0.01)
    with pytest.raises(EnvironmentFailure, match="MindIE-SD cannot be used here") as caught:
        verify(shards, with_runtime=True)
    assert "it took more than" in caught.value.why


def test_without_the_runtime_the_command_says_how_to_come_by_it(shards: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="MindIE-SD is not installed here") as caught:
        verify(shards, with_runtime=True)
    assert "pip install --no-deps mindiesd" in caught.value.advice
