"""The stage and the command that evaluate: what passes, what fails, and that sharing the work changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_config
from launcher.files.folder_lock import hold
from launcher.run import evaluate_published, run
from model_adapters.quality.card import QualityCard, read_card
from model_adapters.quality.verdict import is_broken
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.errors import ConfigurationError, InputError, VerificationError
from tests.support.evaluation import with_wrong_scale
from tests.support.forked_ranks import run_forked
from tests.support.tiny_job import STEPS, run_job
from tests.support.torchrun import ROOT, start_launcher

pytestmark = pytest.mark.distributed

MODEL = ROOT / "scripts" / "tiny_models" / "flux"
PROMPTS = ("a red star on a purple ground", "a blue cross on a black ground", "a green heart on a yellow ground")
CALIBRATED, PICTURES = 2, 3
LAYER = "transformer_blocks.1.attn.to_q"
# Measured: 48 to 53 dB; the worst layer 37.
THRESHOLDS = {"min_psnr": 35, "max_flip": 0.05, "min_output_sqnr": 20, "min_layer_sqnr": 25}
FLAGS = [word for name, value in THRESHOLDS.items() for word in (f"--{name}", str(value))]
SCHEME = "w8a8_dynamic"


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    path.chmod(0o640)
    return path


def of_one_rank(folder: Path) -> JobConfig:
    pipeline = {"path": str(MODEL), "prompt_path": str(write_prompts(folder)), "max_num_prompt": CALIBRATED}
    tree: dict[str, Any] = {
        "pipeline": {**pipeline, "width": 64, "height": 64, "infer_steps": STEPS},
        "quantization": {"do_quant": True, "quant_type": SCHEME},
        "ranks": {"device": "cpu"},
        "output": {"quant_weight_save_folder": folder / "weights", "quant_dump_calib_folder": folder / "dumps"},
        "evaluation": {"evaluate": PICTURES, **THRESHOLDS},
    }
    return job_config("flux", tree)


def asked(out: Path, *words: object) -> JobConfig:
    """Return what the ranks of `evaluate OUT WORDS` run."""
    invocation = parse(["evaluate", str(out / "weights"), *map(str, words)])
    return invocation.command.job(invocation.options)


def card_of(out: Path) -> QualityCard:
    return read_card(out / "weights" / "quality" / "quality.json")


def copied(out: Path, target: Path) -> Path:
    """Copy a published checkpoint and its calibration data, without what was evaluated."""
    shutil.copytree(out, target, ignore=shutil.ignore_patterns("quality", "logs"))
    return target


def in_copy(job: Path, target: Path) -> tuple[object, ...]:
    """Return the words that lead an evaluation of a copy to the copy's calibration data; they stand in its job."""
    told = target / "weights" / "quant_job.yaml"
    told.write_text(told.read_text().replace(str(job / "dumps"), str(target / "dumps")))
    return ("evaluate", target / "weights")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a job of one rank that evaluated what it published."""
    folder = tmp_path_factory.mktemp("alone")
    run(of_one_rank(folder))
    return folder


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a job of two ranks, one copy of the model, that evaluated what it published."""
    folder = tmp_path_factory.mktemp("dual")
    finished = run_job(
        2, "flux", MODEL, write_prompts(folder), folder, "--device_type", "A2-32g-dual", "--quant_type", SCHEME,
        "--max_num_prompt", str(CALIBRATED), "--evaluate", str(PICTURES), *FLAGS,
    )  # fmt: skip
    (folder / "stdout.txt").write_text(finished.stdout)
    return folder


def test_an_untouched_checkpoint_passes_and_its_card_says_what_it_is_of(alone: Path):
    card = card_of(alone)
    assert not is_broken(card)
    assert card.mean is not None
    assert card.mean.psnr > THRESHOLDS["min_psnr"]
    # The prompt that calibration left out, then the others with other noise.
    assert [picture.prompt for picture in card.pictures] == [PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    manifest = json.loads((alone / "weights" / "quant_manifest.json").read_text())
    assert card.origin.fingerprint == manifest["fingerprint"]
    pictures = sorted(path.relative_to(alone / "weights" / "quality") for path in alone.rglob("*.png"))
    assert len(pictures) == 1 + 3 * PICTURES
    assert not (alone / "weights" / "quality" / "work").exists()


def test_two_ranks_find_what_one_finds_but_for_their_own_scales(alone: Path, dual: Path):
    one, two = card_of(alone), card_of(dual)
    assert [picture.seed for picture in one.pictures] == [picture.seed for picture in two.pictures]
    assert [layer.name for layer in one.layers] == [layer.name for layer in two.layers]
    differences = [b.sqnr - a.sqnr for a, b in zip(one.layers, two.layers)]
    # A row-split layer has a scale a rank, which is a little better; all others are the same.
    assert sum(abs(difference) <= 0.1 for difference in differences) > len(differences) / 2
    assert all(abs(difference) < 2 for difference in differences)
    assert two.output_sqnr == pytest.approx(one.output_sqnr, abs=2)
    assert two.mean.psnr == pytest.approx(one.mean.psnr, abs=4)  # pyright: ignore[reportOptionalMemberAccess]
    assert "evaluate: The worst of 45 layers" in (dual / "stdout.txt").read_text()


def test_two_copies_of_two_ranks_make_the_same_card_and_sheet_to_the_byte(dual: Path, tmp_path: Path):
    copy = copied(dual, tmp_path / "copy")
    done = run_forked(
        4, "-m", "launcher", "evaluate", copy / "weights", "--evaluate", str(PICTURES), *FLAGS, timeout_s=280
    )
    assert done.returncode == 0, done.stderr
    assert "world 4 = dp 2 × tp 2" in done.stdout
    for name in ("quality.json", "contact_sheet.png"):
        ours, theirs = (out / "weights" / "quality" / name for out in (copy, dual))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_scale_broken_on_purpose_in_one_layer_fails_the_gate_on_all_ranks(dual: Path, tmp_path: Path):
    copy = copied(dual, tmp_path / "copy")
    weights = copy / "weights"
    files = CheckpointFiles(
        weights / f"quant_model_weight_{SCHEME}_1.safetensors", weights / f"quant_model_description_{SCHEME}_1.json"
    )
    broken = with_wrong_scale(files, LAYER, tmp_path / "broken")
    shutil.copy2(broken.weights, files.weights)
    process = start_launcher("--nproc_per_node", 2, *in_copy(dual, copy), "--evaluate", 0, "--min_layer_sqnr", 25)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 7, output
    assert "error: the checkpoint falls short of what was asked for" in output
    assert f"SQNR of '{LAYER}' is" in output
    assert "below 25" in output
    assert "ranks 0, 1, judging the checkpoint" in output
    assert f"changed since they were published, and measured as they are: {files.weights.name}" in output
    assert "BROKEN: 1 layer below" in output
    card = card_of(copy)
    assert card.pictures == ()
    assert card.worst_layers[0].name == LAYER
    assert json.loads((weights / "status.json").read_text())["exit_code"] == 7


def test_a_broken_layer_ends_with_seven_where_nothing_was_asked_for(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    names = (f"quant_model_weight_{SCHEME}.safetensors", f"quant_model_description_{SCHEME}.json")
    files = CheckpointFiles(*(copy / "weights" / name for name in names))
    shutil.copy2(with_wrong_scale(files, LAYER, tmp_path / "broken").weights, files.weights)
    job = asked(copy, "--evaluate", 0)
    nothing = dict.fromkeys(THRESHOLDS)
    with pytest.raises(VerificationError, match="the checkpoint is broken"):
        evaluate_published(job.model_copy(update={"evaluation": job.evaluation.model_copy(update=nothing)}))
    assert is_broken(card_of(copy))


def test_files_of_swapped_ranks_are_refused(dual: Path, tmp_path: Path):
    copy = copied(dual, tmp_path / "copy")
    for first in sorted((copy / "weights").glob("quant_model_*_0.*")):
        second = first.with_name(first.name.replace("_0.", "_1."))
        swapped = first.read_bytes(), second.read_bytes()
        second.write_bytes(swapped[0])
        first.write_bytes(swapped[1])
    done = run_forked(2, "-m", "launcher", *map(str, in_copy(dual, copy)), "--evaluate", "1")
    assert done.returncode == 7, done.stderr
    said = done.stderr
    assert "error: the file of shard 0 holds shard 1" in said or "error: the file of shard 1 holds shard 0" in said
    assert not (copy / "weights" / "quality").exists()


def test_layers_are_compared_without_the_prompts_and_tokenizers_that_nothing_reads(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    model = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    evaluate_published(asked(copy, "--evaluate", 0, "--prompt_path", tmp_path / "gone.txt", "--path", model))
    assert card_of(copy).layers
    with pytest.raises(InputError, match="no such prompt file"):
        evaluate_published(asked(copy, "--evaluate", PICTURES, "--prompt_path", tmp_path / "gone.txt"))


def test_what_was_evaluated_is_not_evaluated_again_but_judged_again(alone: Path, capsys: pytest.CaptureFixture[str]):
    quality = alone / "weights" / "quality"
    before = {path: path.stat().st_mtime_ns for path in quality.rglob("*")}
    run(of_one_rank(alone))
    assert "published already" in (said := capsys.readouterr().out)
    assert "evaluated already" in said
    with pytest.raises(VerificationError, match="falls short") as caught:
        evaluate_published(asked(alone, "--evaluate", PICTURES, "--min_psnr", 99))
    assert "below 99" in caught.value.why
    assert before == {path: path.stat().st_mtime_ns for path in quality.rglob("*")}


def test_the_card_of_the_same_checkpoint_made_twice_is_identical_and_needs_no_other_folder(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    with hold(alone / "dumps", "--quant_dump_calib_folder", "a job that uses the same calibration data"):
        evaluate_published(asked(copy, "--evaluate", PICTURES))
    for name in ("quality.json", "contact_sheet.png"):
        ours, theirs = (out / "weights" / "quality" / name for out in (copy, alone))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_layers_alone_are_compared_on_the_calibration_data(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    stale = copy / "weights" / "quality" / "float" / "2_0.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    told = asked(copy, "--evaluate", 0, "--min_layer_sqnr", 25)
    evaluate_published(told.model_copy(update={"output": told.output.model_copy(update={"resume": "never"})}))
    card = card_of(copy)
    assert card.pictures == ()
    assert [layer.name for layer in card.layers] == [layer.name for layer in card_of(alone).layers]
    assert card.output_sqnr == pytest.approx(card_of(alone).output_sqnr, abs=3)
    assert not list((copy / "weights" / "quality").rglob("*.png"))


def test_without_its_calibration_data_layers_alone_cannot_be_compared(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    in_copy(alone, copy)
    for dump in (copy / "dumps").glob("*.pth"):
        dump.unlink()
    with pytest.raises(InputError, match="no calibration data of this checkpoint"):
        evaluate_published(asked(copy, "--evaluate", 0))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(InputError, match="the job that made the checkpoint is not known"):
        asked(tmp_path)
    (tmp_path / "weights" / "quant_job.yaml").write_text(of_one_rank(tmp_path).to_yaml())
    with pytest.raises(InputError, match="no checkpoint is published here"):
        asked(tmp_path)


def made_by(
    folder: Path, ranks: dict[str, object] | None = None, output: dict[str, object] | None = None, **evaluation: object
) -> Path:
    """Write what a job leaves that was to ignore earlier runs, as far as the command reads it before it runs."""
    job, weights = of_one_rank(folder), folder / "weights"
    weights.mkdir()
    changed = {
        "ranks": job.ranks.model_copy(update=ranks),
        "output": job.output.model_copy(update={"resume": "never", "do_save_img": True} | (output or {})),
        "evaluation": job.evaluation.model_copy(update=evaluation),
    }
    told = job.model_copy(update=changed)
    (weights / "quant_job.yaml").write_text(told.to_yaml())
    (weights / "quant_manifest.json").write_text("{}")
    return folder


def test_what_is_not_given_is_as_in_the_job_but_for_what_it_was_to_ignore(tmp_path: Path):
    made_by(tmp_path, evaluate_prompts=Path("some.txt"))
    told = asked(tmp_path, "--min_psnr", 40)
    assert told.evaluation.model_dump(exclude_none=True) == {
        **THRESHOLDS, "min_psnr": 40, "evaluate": PICTURES, "evaluate_prompts": Path("some.txt"),
    }  # fmt: skip
    assert (told.output.resume, told.output.do_save_img) == ("auto", False)
    without_pictures = asked(tmp_path, "--evaluate", 0).evaluation
    assert without_pictures.model_dump(exclude_none=True) == {
        "evaluate": 0, "min_output_sqnr": THRESHOLDS["min_output_sqnr"], "min_layer_sqnr": THRESHOLDS["min_layer_sqnr"],
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="makes no pictures"):
        asked(tmp_path, "--evaluate", 0, "--min_psnr", 40)


def test_a_job_that_measured_nothing_is_evaluated_on_four_pictures(tmp_path: Path):
    made_by(tmp_path, evaluate=None, **dict.fromkeys(THRESHOLDS))
    assert asked(tmp_path).evaluation.evaluate == 4


def test_the_card_of_the_job_is_no_word_on_a_device_of_another_kind(tmp_path: Path):
    made_by(tmp_path, ranks={"device": "npu", "device_id": 3})
    moved, stayed = asked(tmp_path, "--device", "cpu"), asked(tmp_path, "--device", "npu")
    assert (moved.ranks.device, moved.ranks.device_id) == ("cpu", 0)
    assert (stayed.ranks.device, stayed.ranks.device_id) == ("npu", 3)


def test_layers_alone_of_a_job_that_kept_no_calibration_data_are_refused_with_what_can_be_measured(tmp_path: Path):
    made_by(tmp_path, output={"no_dump": True})
    assert asked(tmp_path).evaluation.evaluate == PICTURES
    with pytest.raises(ConfigurationError, match="no calibration data") as refused:
        asked(tmp_path, "--evaluate", 0)
    assert refused.value.advice.startswith("--evaluate 4")


def test_an_evaluation_that_is_asked_to_leave_goes_on_with_the_next_picture(alone: Path, tmp_path: Path):
    copy = copied(alone, tmp_path / "copy")
    process = start_launcher(*in_copy(alone, copy), "--evaluate", PICTURES)
    first = copy / "weights" / "quality" / "float" / "2_0.json"
    _wait_for(first.exists, lambda: process.poll() is None)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    made = {path: path.stat().st_mtime_ns for path in (copy / "weights" / "quality").rglob("*.png")}
    assert 1 <= len(made) < 3 * PICTURES
    evaluate_published(asked(copy, "--evaluate", PICTURES))
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert card_of(copy) == card_of(alone)


def _wait_for(happened: Callable[[], bool], goes_on: Callable[[], bool]) -> None:
    while not happened():
        assert goes_on()
        time.sleep(0.02)
