"""A published checkpoint of two ranks, made to serve another number of steps without running anything again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.config.resolve import job_from_yaml
from launcher.files.folder_lock import hold
from launcher.files.manifest import read_manifest
from launcher.inspection.verify import verify
from quant_core.calibration.records import load_dump
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.errors import FolderInUse, InputError
from tests.distributed.conftest import PublishedJob
from tests.support.tiny_job import STEPS, run_job

pytestmark = pytest.mark.distributed

HEUN = "FlowMatchHeunDiscreteScheduler"


@pytest.fixture(scope="module")
def published(dual_timestep_job: PublishedJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what the job published, whose folder others read too."""
    return shutil.copytree(dual_timestep_job.folder / "weights", tmp_path_factory.mktemp("restep") / "weights")


def run(*words: str) -> None:
    parse(["restep", *words]).run(None)


def shard(folder: Path, rank: int) -> Checkpoint:
    stem = f"w8a8_timestep_{rank}"
    weights, description = f"quant_model_weight_{stem}.safetensors", f"quant_model_description_{stem}.json"
    return open_checkpoint(CheckpointFiles(folder / weights, folder / description))


def test_the_header_says_the_noise_levels_that_the_pipeline_ran(published: Path, dual_timestep_job: PublishedJob):
    """The transformer of FLUX is called with sigma."""
    records = load_dump(dual_timestep_job.folder / "dumps" / "calib_data_rank0.pth")["records"]
    seen = {record["timestep_idx"]: record["kwargs"]["timestep"].float().mean().item() for record in records}
    levels = json.loads(shard(published, 0).metadata["sigmas"])
    assert levels == pytest.approx([seen[step] for step in range(STEPS)], rel=0.01)


def test_both_shards_get_the_rows_of_the_new_steps_and_the_manifest_says_so(published: Path):
    run(str(published), "--infer_steps", "2")
    copy = published.with_name("weights_2steps")
    manifest = read_manifest(copy / "quant_manifest.json")
    assert manifest is not None
    assert manifest.timestep_policy is not None
    assert manifest.timestep_policy.timesteps == 2
    assert manifest.fields["pipeline.infer_steps"] == 2
    assert manifest.fields["quantization.timestep_sep"] == manifest.timestep_policy.timestep_sep
    assert verify(copy).findings == []
    for rank in (0, 1):
        before, after = shard(published, rank), shard(copy, rank)
        assert (before.inventory.timesteps, after.inventory.timesteps) == (STEPS, 2)
        assert after.timestep_sep == manifest.timestep_policy.timestep_sep
        assert before.metadata["tp_rank"] == after.metadata["tp_rank"] == str(rank)


def test_the_copy_can_be_evaluated_and_says_which_job_it_is_of(published: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(published)
    run(".", "--infer_steps", "3")
    copy = published.with_name("weights_3steps")
    asked = parse(["evaluate", str(copy)])
    job = asked.command.job(asked.options)
    assert job.pipeline.infer_steps == 3
    assert job.output.quant_weight_save_folder == copy
    written = job_from_yaml((copy / "quant_job.yaml").read_text())
    assert written.quantization.timestep_sep == shard(copy, 0).timestep_sep
    assert written.output.quant_weight_save_folder == copy


def test_rows_for_a_shift_of_their_own_are_not_measured_on_the_pipelines_schedule(published: Path, tmp_path: Path):
    copy = tmp_path / "shifted"
    run(str(published), "--infer_steps", "2", "--shift", "2", "--to", str(copy))
    asked = parse(["evaluate", str(copy)])
    with pytest.raises(InputError, match=r"shift 2\.0") as refused:
        asked.command.job(asked.options)
    assert refused.value.where == str(copy / "quant_manifest.json")


def test_a_copy_replaces_no_checkpoint_and_waits_for_no_job(published: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    with pytest.raises(InputError, match="holds a checkpoint"):
        run(str(published), "--infer_steps", "2", "--to", str(published / ".." / published.name))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with hold(tmp_path, "--to", "a job"), pytest.raises(FolderInUse):
        run(str(published), "--infer_steps", "2", "--to", str(tmp_path))


def test_steps_beyond_the_calibrated_noise_are_refused_and_nothing_is_published(published: Path, tmp_path: Path):
    with pytest.raises(InputError, match="leave the calibrated noise levels"):
        run(str(published), "--infer_steps", "50", "--to", str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "quant_manifest.json").exists()


def test_a_source_that_was_changed_since_it_was_published_is_not_copied(published: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(published, tmp_path / "damaged"))
    weights = damaged / "quant_model_weight_w8a8_timestep_1.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="changed since it was published") as refused:
        run(str(damaged), "--infer_steps", "2", "--to", str(tmp_path / "copy"))
    assert weights.name in refused.value.why
    assert not (tmp_path / "copy" / "quant_manifest.json").exists()


def test_a_source_that_a_job_works_in_is_not_read(published: Path, tmp_path: Path):
    with hold(published, "--quant_weight_save_folder", "a job"), pytest.raises(FolderInUse):
        run(str(published), "--infer_steps", "2", "--to", str(tmp_path / "copy"))


def test_the_rows_of_a_scheduler_that_stays_at_a_level_serve_their_own_steps_only(
    tiny_sd3_folder: Path, prompt_file: Path, tmp_path: Path
):
    pipeline = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "heun"))
    for file, name in (("scheduler/scheduler_config.json", "_class_name"), ("model_index.json", "scheduler")):
        content = json.loads((pipeline / file).read_text())
        content[name] = HEUN if name == "_class_name" else ["diffusers", HEUN]
        (pipeline / file).write_text(json.dumps(content))
    run_job(1, "sd3", pipeline, prompt_file, tmp_path, "--quant_type", "w8a8_timestep", "--max_num_prompt", "1")
    with pytest.raises(InputError, match="does not say at which noise levels"):
        run(str(tmp_path / "weights"), "--infer_steps", "2")


def test_a_folder_without_rows_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="nothing is published there"):
        run(str(tmp_path), "--infer_steps", "2")
