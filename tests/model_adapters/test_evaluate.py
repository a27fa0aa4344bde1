"""Evaluating a published checkpoint: figures that mean something, the same each time, whoever did how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_adapters.quality import evaluate as evaluate_module
from model_adapters.quality.card import QualityCard, read_card
from model_adapters.quality.evaluate import evaluate_layers, held_together, published
from model_adapters.quality.gate import Thresholds, check_quality, shortfalls
from model_adapters.quality.painting import paint
from model_adapters.quality.results import CARD, SHEET, write_results
from model_adapters.quality.store import FLOAT, FLOOR, QUANTIZED
from model_adapters.quality.verdict import is_broken, verdict
from quant_core.errors import VerificationError
from tests.support.evaluation import PROMPTS, STEPS, Subject, make_subject, with_wrong_scale

CASES = {"flux": "w8a8_dynamic", "sd3": "w8a8"}
# What every untouched checkpoint of the tiny pipelines reaches; their layers have injected outliers.
REACHED = Thresholds(min_psnr=20, min_ssim=0.8, max_flip=0.4, min_output_sqnr=10, min_layer_sqnr=7)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, request: Any) -> dict[str, Subject]:
    folder = tmp_path_factory.mktemp("subjects")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red star on a blue ground\na green ring on a yellow ground\n")
    prompts.chmod(0o640)
    paths = {kind: request.getfixturevalue(f"tiny_{kind}_folder") for kind in CASES}
    return {kind: make_subject(kind, paths[kind], prompts, scheme, folder / kind) for kind, scheme in CASES.items()}


@pytest.fixture(scope="module")
def folders(subjects: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished evaluations, their cards and sheets beside the pictures."""
    folders = {}
    for kind, subject in subjects.items():
        folder = folders[kind] = tmp_path_factory.mktemp(f"quality_{kind}")
        card = subject.card(subject.evaluate(folder))
        requests = [request for batch in subject.batches for request in batch]
        write_results(folder, card, subject.painting(folder).store, requests)
    return folders


@pytest.fixture(scope="module")
def cards(folders: dict[str, Path]) -> dict[str, QualityCard]:
    return {kind: read_card(folder / CARD) for kind, folder in folders.items()}


each_kind = pytest.mark.parametrize("kind", CASES)


@each_kind
def test_an_untouched_checkpoint_passes_and_its_card_is_whole(kind: str, cards: dict[str, QualityCard]):
    card = cards[kind]
    check_quality(card, REACHED, where=kind)
    assert not is_broken(card)
    assert [picture.number for picture in card.pictures] == list(range(PROMPTS))
    assert [step.step for step in card.steps] == list(range(STEPS))
    assert all(None not in (s.latents, s.latents_floor, s.output, s.output_floor) for s in card.steps)
    assert all(set(layer.steps) == set(range(STEPS)) for layer in card.layers)
    assert verdict(card)


@each_kind
def test_the_noise_floor_is_far_above_what_quantization_does(kind: str, cards: dict[str, QualityCard]):
    card = cards[kind]
    assert card.mean is not None
    assert card.mean_floor is not None
    # Measured: floor 56 (bfloat16) and 60 dB (float16), quantized 25 to 35.
    assert card.mean_floor.psnr > 50
    assert card.mean_floor.psnr > card.mean.psnr + 10
    assert card.mean_floor.flip < card.mean.flip
    assert card.output_floor_sqnr > card.output_sqnr + 10


def test_the_same_checkpoint_gets_the_same_card_and_sheet_again(
    subjects: dict[str, Subject], folders: dict[str, Path], tmp_path: Path
):
    subject = subjects["flux"]
    again = subject.card(subject.evaluate(tmp_path))
    requests = [request for batch in subject.batches for request in batch]
    write_results(tmp_path, again, subject.painting(tmp_path).store, requests)
    for name in (CARD, SHEET):
        assert (tmp_path / name).read_bytes() == (folders["flux"] / name).read_bytes()


def test_shares_of_the_pictures_make_the_card_of_the_whole(
    subjects: dict[str, Subject], folders: dict[str, Path], tmp_path: Path
):
    subject = subjects["sd3"]
    parts = [subject.evaluate(tmp_path, [batch]) for batch in reversed(subject.batches)]
    assert subject.card(*parts).to_json() == (folders["sd3"] / CARD).read_text()


@each_kind
def test_a_scale_broken_on_purpose_in_one_layer_fails_the_gate(
    kind: str, subjects: dict[str, Subject], folders: dict[str, Path], tmp_path: Path
):
    subject = subjects[kind]
    layer = "transformer_blocks.1.ff.net.0.proj"
    broken = subject.with_files(with_wrong_scale(subject.files, layer, tmp_path / "broken"))
    card = broken.card(broken.evaluate(tmp_path / "quality"))
    assert card.worst_layers[0].name == layer
    assert is_broken(card)
    assert any(sentence.startswith("BROKEN") for sentence in verdict(card))
    with pytest.raises(VerificationError, match="falls short"):
        check_quality(card, REACHED, where="broken")
    assert f"'{layer}'" in " ".join(shortfalls(card, REACHED))
    whole = read_card(folders[kind] / CARD)
    assert card.mean.psnr < whole.mean.psnr  # pyright: ignore[reportOptionalMemberAccess]
    assert card.output_sqnr < whole.output_sqnr  # pyright: ignore[reportOperatorIssue]


def test_layers_alone_need_records_and_no_pipeline(
    subjects: dict[str, Subject], folders: dict[str, Path], cards: dict[str, QualityCard]
):
    subject = subjects["sd3"]
    records = subject.painting(folders["sd3"]).store.records(subject.batches)
    measured = evaluate_layers(subject.transformer(), published(subject.files), records, dtype=subject.dtype)
    card = subject.card(measured)
    assert card.pictures == ()
    assert card.layers == cards["sd3"].layers
    assert card.output_sqnr == cards["sd3"].output_sqnr
    assert shortfalls(card, REACHED)[0] == "PSNR of the pictures was not measured"


def test_it_makes_no_difference_how_many_layers_are_held_at_once(
    subjects: dict[str, Subject],
    folders: dict[str, Path],
    cards: dict[str, QualityCard],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(evaluate_module, "HELD_BYTES", 80_000)
    subject, told = subjects["sd3"], []
    records = subject.painting(folders["sd3"]).store.records(subject.batches)
    measured = evaluate_layers(
        subject.transformer(),
        published(subject.files),
        records,
        dtype=subject.dtype,
        progress=lambda stage, done, total: told.append((stage, done, total)),
    )
    assert subject.card(measured).layers == cards["sd3"].layers
    done, total = zip(*[progress[1:] for progress in told if progress[0] == "compare layers"])
    assert list(done) == list(range(1, total[0] + 1))
    assert total[0] > 2 * len(records)


def test_layers_are_held_in_groups_that_fit():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    assert held_together(sizes, 6) == [["a", "b"], ["c"], ["d"]]
    assert held_together(sizes, 100) == [["a", "b", "c", "d"]]
    assert held_together({}, 6) == []


def test_an_interrupted_evaluation_goes_on_with_the_next_picture(
    subjects: dict[str, Subject], folders: dict[str, Path], tmp_path: Path
):
    subject = subjects["sd3"]

    class Stopped(Exception):
        pass

    def stop(kind: str, done: int, total: int) -> None:
        if (kind, done) == (FLOOR, 1):
            raise Stopped

    with pytest.raises(Stopped):
        subject.evaluate(tmp_path, after_batch=stop)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert {path.parent.name for path in before} == {FLOAT, FLOOR}
    card = subject.card(subject.evaluate(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert card.to_json() == (folders["sd3"] / CARD).read_text()


def test_pictures_of_another_checkpoint_are_made_anew_and_those_of_the_float_model_are_not(
    subjects: dict[str, Subject], folders: dict[str, Path]
):
    subject = subjects["flux"]
    store = subject.painting(folders["flux"]).store
    other = type(store)(store.folder, {**store.fingerprints, QUANTIZED: "another"}, store.seed)
    for batch in subject.batches:
        assert [store.has(kind, batch) for kind in (FLOAT, FLOOR, QUANTIZED)] == [True, True, True]
        assert [other.has(kind, batch) for kind in (FLOAT, FLOOR, QUANTIZED)] == [True, True, False]


def test_a_rank_that_keeps_nothing_paints_the_same_without_writing(subjects: dict[str, Subject], tmp_path: Path):
    subject = subjects["sd3"]
    told = []
    painting = subject.painting(tmp_path, saves=False, after_batch=lambda *progress: told.append(progress))
    paint(painting, FLOAT, subject.pipeline())
    assert told == [(FLOAT, 1, PROMPTS), (FLOAT, 2, PROMPTS)]
    assert not list(tmp_path.rglob("*"))


def test_what_nobody_looks_at_is_removed_and_pictures_stay(subjects: dict[str, Subject], tmp_path: Path):
    subject = subjects["sd3"]
    painting = subject.painting(tmp_path, subject.batches[:1])
    paint(painting, FLOAT, subject.pipeline())
    painting.store.tidy(painting.batches)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0_0.json", "0_0.png", "float"]


@each_kind
def test_latents_and_decoder_are_float32_while_the_transformer_keeps_its_dtype(
    kind: str, subjects: dict[str, Subject], tmp_path: Path
):
    subject = subjects[kind]
    pipeline, seen = subject.pipeline(), {}

    def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["inputs"] = {name: value.dtype for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        seen["output"] = output[0].dtype

    # Between the casts and the model: registered before the casts, which put themselves around it.
    pipeline.transformer.register_forward_hook(see, with_kwargs=True)
    painting = subject.painting(tmp_path, subject.batches[:1])
    paint(painting, FLOAT, pipeline)
    assert seen["inputs"]["hidden_states"] == seen["inputs"]["encoder_hidden_states"] == subject.dtype
    assert seen["inputs"]["timestep"] == torch.float32
    assert seen["output"] == subject.dtype
    assert painting.store.latents(subject.batches[0], 0).dtype == torch.float32
    assert pipeline.vae.dtype == torch.float32
