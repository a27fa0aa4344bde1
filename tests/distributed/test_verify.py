"""`launcher verify` accepts what jobs publish, and finds each of a hundred kinds of damage, by file and tensor."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.files.digests import remember
from launcher.files.manifest import read_manifest
from launcher.files.run_folder import MANIFEST
from launcher.inspection.verify import told, verify
from quant_core.errors import InputError, VerificationError
from tests.distributed.conftest import PublishedJob
from tests.distributed.corruptions import COL, CORRUPTIONS, Folder, put
from tests.support.golden_cases import GOLDEN

pytestmark = pytest.mark.distributed

SCHEMES = {"steps": "w8a8_timestep", "smoothed": "w8a8_dynamic", "sd3": "w8a8"}


@pytest.fixture(scope="session")
def jobs(dual_timestep_job, dual_smoothed_job, dual_sd3_job) -> dict[str, PublishedJob]:
    return {"steps": dual_timestep_job, "smoothed": dual_smoothed_job, "sd3": dual_sd3_job}


def copy(job: PublishedJob, scheme: str, folder: Path) -> Folder:
    shutil.copytree(job.folder / "weights", folder / "weights", ignore=shutil.ignore_patterns("logs", "status.json"))
    return Folder(folder / "weights", scheme)


@pytest.mark.parametrize("job", SCHEMES)
def test_what_a_job_publishes_is_accepted_also_rewritten_by_the_tests(job: str, jobs, tmp_path: Path):
    assert verify(jobs[job].folder / "weights").findings == []
    folder = copy(jobs[job], SCHEMES[job], tmp_path)
    for rank in (0, 1):
        folder.rewrite(rank, lambda *_: None)
    folder.redo_digests()
    assert verify(folder.path).findings == []


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_damage_is_found_and_its_file_and_tensor_named(name: str, jobs, tmp_path: Path):
    wanted = CORRUPTIONS[name]
    folder = copy(jobs[wanted.job], SCHEMES[wanted.job], tmp_path)
    wanted.damage(folder)
    if wanted.digests:
        folder.redo_digests()
    found = verify(folder.path).findings
    file = wanted.file.format(SCHEMES[wanted.job])
    hits = [each for each in found if each.rule == wanted.rule and each.file.name.endswith(file)]
    assert any(each.tensor == wanted.tensor for each in hits), found
    assert all(each.what and each.why for each in found)


def test_what_is_remembered_of_a_file_does_not_hide_that_its_content_changed(jobs, tmp_path: Path):
    folder = copy(jobs["steps"], SCHEMES["steps"], tmp_path)
    [published, *_] = read_manifest(folder.path / MANIFEST).files
    path = folder.path / published.name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    time.sleep(0.2)  # twice the grain of a clock that is reckoned with
    remember(path, published.sha256)
    assert [each.file for each in verify(folder.path).findings if each.rule == "digests"] == [path]


def test_all_that_is_wrong_is_listed_and_not_the_first(jobs, tmp_path: Path):
    folder = copy(jobs["steps"], SCHEMES["steps"], tmp_path)
    for rank in (0, 1):
        put(f"{COL}.weight_scale", 0, rank=rank)(folder)
        put(f"{COL}.bias", float("nan"), rank=rank)(folder)
    found = [(each.rule, each.file.name[-13:-12], each.tensor) for each in verify(folder.path).findings]
    named = {(f"{COL}.weight_scale"), (f"{COL}.bias")}
    assert {(rank, tensor) for rule, rank, tensor in found if rule == "values"} == {
        (rank, tensor) for rank in "01" for tensor in named
    }
    assert sum(rule == "digests" for rule, *_ in found) == 4


def test_a_model_of_other_weights_is_told_from_the_one_that_was_quantized(jobs, tiny_sd3_folder, tmp_path: Path):
    job = jobs["sd3"].folder / "weights"
    sound = verify(job, str(tiny_sd3_folder))
    assert sound.findings == []
    assert len(sound.layers) == 44
    assert all(35 < ratio.decibels < 60 for ratio in sound.layers.values())
    other = shutil.copytree(tiny_sd3_folder, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[f"{COL}.weight"] = tensors[f"{COL}.weight"].flip(0)
    tensors["proj_out.bias"] += 1
    save_file(tensors, path)
    found = verify(job, str(other)).findings
    assert {(each.rule, each.tensor) for each in found} == {
        ("the model's weights", f"{COL}.weight"),
        ("the model's tensors", "proj_out.bias"),
    }


def test_files_that_cannot_be_opened_are_said_not_to_have_been_compared(jobs, tiny_sd3_folder, tmp_path: Path):
    folder = copy(jobs["sd3"], SCHEMES["sd3"], tmp_path)
    weights = next(folder.path.glob("*_1.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    alone, compared = verify(folder.path), verify(folder.path, str(tiny_sd3_folder), with_runtime=True)
    assert alone.remarks == []
    why = "the files of 1 of 2 ranks cannot be opened"
    assert compared.remarks == [f"not compared with the model and the runtime: {why}"]
    assert compared.findings == alone.findings
    assert {finding.rule for finding in alone.findings} == {"readable", "digests"}


def test_the_command_prints_all_of_it_and_ends_with_the_code_of_verification(jobs, tmp_path: Path, capsys):
    parse(["verify", str(jobs["smoothed"].folder / "weights")]).run(None)
    said = capsys.readouterr().out
    assert "49 layers as W8A8_DYNAMIC, 20 with a factor on their input" in said
    assert "the scales of 4 attentions (FAQuant) have no reader" in said
    assert said.endswith("ok: every rule holds\n")
    folder = copy(jobs["steps"], SCHEMES["steps"], tmp_path)
    put(f"{COL}.weight", -128)(folder)
    with pytest.raises(VerificationError, match="findings in the checkpoint"):
        parse(["verify", str(folder.path), "--json"]).run(None)
    told_as_json = json.loads(capsys.readouterr().out)
    assert told_as_json["sound"] is False
    assert ("values", f"{COL}.weight") in [(found["rule"], found["tensor"]) for found in told_as_json["findings"]]


def test_static_steps_come_with_the_line_that_registers_them(jobs):
    said = "\n".join(told(verify(jobs["steps"].folder / "weights")))
    assert 'policy.register(range(2, 4), "static", target="w8a8_static_linear")' in said
    assert "register steps 2 to 3, or every step runs dynamic without a word" in said


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_files_of_the_reference_tool_are_accepted_without_a_manifest(case: str, tmp_path: Path):
    for path in (GOLDEN / case).glob("quant_model_*"):
        shutil.copy(path, tmp_path)
        (tmp_path / path.name).chmod(0o640)
    found = verify(tmp_path)
    assert found.findings == []
    assert "no manifest" in found.remarks[0]


def test_a_folder_without_a_checkpoint_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="no checkpoint in this folder"):
        verify(tmp_path)
