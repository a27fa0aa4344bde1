"""Many copies of the model, many slices of it: the published checkpoint does not depend on who computed what.

The records of a copy are those of its own prompts, in the order of the prompt file; rank by rank, the copies' shares
follow each other. With float32 numerics every statistic is a minimum, a maximum or a sum over records, so neither that
order nor the number of copies shows in the result.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quant_core.calibration.records import load_dump
from scripts.make_tiny_pipeline import write_prompts
from scripts.split_transformer import split
from tests.distributed.conftest import PublishedJob
from tests.support import consumer
from tests.support.golden_cases import Written, differing
from tests.support.tiny_job import run_job
from tests.support.tiny_models import save
from tests.support.torchrun import run_torchrun

pytestmark = pytest.mark.distributed

DUAL = ("--device_type", "A2-32g-dual")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "calib_prompts.txt")


@pytest.fixture
def one_copy(dual_timestep_job: PublishedJob) -> Path:
    """What two ranks, one copy of the model, publish."""
    return dual_timestep_job.folder


def published(out: Path, scheme: str, rank: int) -> Written:
    return Written.read(out / "weights", scheme, suffix=f"_{rank}")


def assert_same(out: Path, other: Path, scheme: str) -> None:
    for rank in (0, 1):
        ours, theirs = published(out, scheme, rank), published(other, scheme, rank)
        assert differing(ours.tensors, theirs.tensors) == []
        assert ours.description == theirs.description


def test_two_copies_of_two_shards_publish_what_one_copy_does_each_shard_once(
    dual_timestep_job: PublishedJob, tiny_flux_folder, tmp_path
):
    images = ("--do_save_img", "--save_path", tmp_path / "img", "--info_file_save_path", tmp_path / "info.json")
    flags = (*dual_timestep_job.flags, *images)
    finished = run_job(4, "flux", tiny_flux_folder, dual_timestep_job.prompts, tmp_path, *flags, start=run_torchrun)
    assert "world 4 = dp 2 × tp 2" in finished.stdout
    assert sorted(path.name for path in (tmp_path / "weights").glob("*.safetensors")) == [
        "quant_model_weight_w8a8_timestep_0.safetensors",
        "quant_model_weight_w8a8_timestep_1.safetensors",
    ]
    assert_same(tmp_path, dual_timestep_job.folder, "w8a8_timestep")
    dumps = [load_dump(tmp_path / "dumps" / f"calib_data_rank{rank}.pth")["header"] for rank in range(4)]
    assert [header["images"] for header in dumps] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    listed = json.loads((tmp_path / "info.json").read_text())
    assert [Path(image).parent.name for image in listed[0]["images"]] == ["calib_fp", "calib_quant"]
    assert [len(info["images"]) for info in listed] == [2] * 4
    assert all(Path(image).stat().st_size > 0 for info in listed for image in info["images"])


def test_divided_folders_give_the_same_checkpoint_as_the_whole_transformer(
    one_copy, tiny_flux_folder, prompts, tmp_path
):
    divided = Path(shutil.copytree(tiny_flux_folder, tmp_path / "divided"))
    split(divided)
    shutil.rmtree(divided / "transformer")
    run_job(2, "flux", divided, prompts, tmp_path, *DUAL, "--quant_type", "w8a8_timestep")
    assert_same(tmp_path, one_copy, "w8a8_timestep")


def test_three_ranks_share_a_model_whose_heads_three_divides(tiny_flux_folder, prompts, tmp_path):
    # 12 heads of 8, where the other tiny pipelines have 4 of 16; nothing is calibrated, so only the transformer counts.
    folder = Path(shutil.copytree(tiny_flux_folder, tmp_path / "twelve heads"))
    shutil.rmtree(folder / "transformer")
    save("flux", folder)
    flags = ("--tp_size", "3", "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    finished = run_job(3, "flux", folder, prompts, tmp_path, *flags)
    assert "world 3 = dp 1 × tp 3" in finished.stdout
    for rank in range(3):
        consumer.check(consumer.load(tmp_path / "weights", rank, "w8a8_dynamic"), torch.bfloat16)
