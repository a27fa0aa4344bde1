"""A card is data: the same from any sharing of the work, the same file twice, and a gate that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_adapters.quality.card import Origin, QualityCard, Similarity, read_card
from model_adapters.quality.gate import Thresholds, check_quality, shortfalls
from model_adapters.quality.measured import Measured, MeasuredPicture, card_of
from model_adapters.quality.verdict import is_broken, require_sound, verdict
from quant_core.errors import InputError, VerificationError
from quant_core.quality.ratio import LIMIT_DB, Ratio, StepRatios

ORIGIN = Origin(
    model="flux",
    quant_type="W8A8",
    fingerprint="f" * 64,
    options={"width": 64, "height": 64, "infer_steps": 2, "guidance_scale": None},
    dtype="bfloat16",
    floor_dtype="float32",
    versions={"torch": "2.13.0"},
)


def picture(number: int, psnr: float = 40.0, latents: tuple[float, float] = (1e-4, 1e-3)) -> MeasuredPicture:
    """Return a picture whose latents' noise in its two steps is that much, over a signal of 1; the floor's is 1e-5."""
    return MeasuredPicture(
        number=number,
        prompt=f"picture {number}",
        seed=42 + number,
        quantized=Similarity(psnr=psnr + number, ssim=0.98, flip=0.03),
        floor=Similarity(psnr=45, ssim=0.99, flip=0.02),
        latents={step: Ratio(1.0, noise) for step, noise in enumerate(latents)},
        latents_floor={0: Ratio(1.0, 1e-5), 1: Ratio(1.0, 1e-5)},
    )


def ratios(*noises: float) -> StepRatios:
    return StepRatios({step: Ratio(1.0, noise) for step, noise in enumerate(noises)})


def measured(*numbers: int, layers: dict[str, float] | None = None) -> Measured:
    """Return what a rank with these pictures measured; layers: noise over a signal of 1, in two steps."""
    found = layers or {"a": 1e-4, "b": 1e-3, "c": 1e-2, "d": 1e-1}
    return Measured(
        pictures=[picture(number) for number in numbers],
        schemes=dict.fromkeys(found, "W8A8"),
        layers={name: ratios(noise, 2 * noise) for name, noise in found.items()},
        output=ratios(1e-3, 3e-3),
        output_floor=ratios(1e-4, 1e-4),
    )


def card(**changes: Any) -> QualityCard:
    return card_of([measured(0, 1)], ORIGIN).model_copy(update=changes)


def test_a_card_does_not_depend_on_how_the_pictures_were_shared_out():
    together = card_of([measured(0, 1, 2, 3), measured(), measured(), measured()], ORIGIN)
    for shares in ([[0, 1], [2, 3], [], []], [[3], [1], [0], [2]]):
        assert card_of([measured(*share) for share in shares], ORIGIN).to_json() == together.to_json()


def test_a_picture_that_two_ranks_of_one_copy_made_counts_once():
    assert len(card_of([measured(0), measured(0), measured(1), measured(1)], ORIGIN).pictures) == 2


def test_sums_over_ranks_are_what_one_rank_would_have_measured():
    found = card_of([measured(0), measured(1, layers={"a": 3e-4})], ORIGIN)
    # (1 + 1) over (1e-4 + 3e-4) in the first step, twice the noise in the second
    assert found.layers[0].steps == {0: 36.99, 1: 33.98}
    assert found.layers[0].sqnr == 35.23


def test_a_card_read_back_is_the_card_that_was_written(tmp_path: Path):
    path = card().write(tmp_path / "quality.json")
    assert read_card(path) == card()
    assert read_card(path).to_json() == path.read_text()


def test_figures_are_rounded_and_json_has_no_infinity():
    perfect = Measured(
        layers={"a": StepRatios({None: Ratio(1.0, 0.0)})}, output=StepRatios({0: Ratio(1.0, float("nan"))})
    )
    content = json.loads(card_of([perfect], ORIGIN).to_json())
    assert content["layers"][0]["sqnr"] == LIMIT_DB
    assert content["output_sqnr"] == -LIMIT_DB
    assert content["mean"] is None
    assert card_of([measured(0)], ORIGIN).steps[1].latents == 0.0316  # the root of 1e-3, in three digits


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "dit-quality", "version": 9}', '{"format": '])
def test_a_file_that_is_no_card_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "quality.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no quality card"):
        read_card(path)


def test_a_card_is_read_and_judged_without_torch(tmp_path: Path):
    path = card().write(tmp_path / "quality.json")
    program = (
        "import sys; from pathlib import Path\n"
        "from model_adapters.quality.card import read_card\n"
        "from model_adapters.quality.gate import Thresholds, check_quality\n"
        "from model_adapters.quality.verdict import verdict\n"
        f"card = read_card(Path({str(path)!r})); verdict(card); check_quality(card, Thresholds(), where='')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_three_worst_layers_come_worst_first():
    assert [layer.name for layer in card().worst_layers] == ["d", "c", "b"]


def test_error_enters_in_the_first_step_that_leaves_the_floor_by_six_decibels():
    def entry(*noises: float) -> int | None:
        part = Measured(pictures=[picture(0, latents=noises)])
        return card_of([part], ORIGIN).entry_step

    assert entry(3e-5, 5e-5) == 1  # the floor's noise is 1e-5: 4.8 dB above it, then 7.0
    assert entry(5e-5, 3e-5) == 0
    assert entry(3e-5, 3e-5) is None


@pytest.mark.parametrize(
    ("thresholds", "says"),
    [
        ({"min_psnr": 41}, "PSNR of the pictures is 40.5 dB, below 41"),
        ({"min_ssim": 0.99}, "SSIM of the pictures is 0.98, below 0.99"),
        ({"max_flip": 0.02}, "FLIP of the pictures is 0.03, above 0.02"),
        ({"min_output_sqnr": 30}, "SQNR of the transformer's output is 26.99 dB, below 30"),
        ({"min_layer_sqnr": 20}, "SQNR of 'd' is 8.24 dB, below 20 (2 layers fall short)"),
    ],
)
def test_each_threshold_can_fail(thresholds: dict[str, float], says: str):
    assert shortfalls(card(), Thresholds(**thresholds)) == [says]
    with pytest.raises(VerificationError) as caught:
        check_quality(card(), Thresholds(**thresholds), where="OUT/quality.json")
    assert caught.value.why == says
    assert caught.value.where == "OUT/quality.json"
    assert caught.value.advice


def test_a_card_that_reaches_every_threshold_passes():
    reached = Thresholds(min_psnr=40.5, min_ssim=0.98, max_flip=0.03, min_output_sqnr=26, min_layer_sqnr=8)
    check_quality(card(), reached, where="")


def test_what_was_not_measured_falls_short_of_any_threshold():
    nothing = card_of([Measured()], ORIGIN)
    asked = Thresholds(min_psnr=0, min_ssim=-1, max_flip=1, min_output_sqnr=-150, min_layer_sqnr=-150)
    found = shortfalls(nothing, asked)
    assert len(found) == 5
    assert all("not measured" in sentence for sentence in found)


def test_the_verdict_names_floor_entry_output_and_worst_layers():
    words = " ".join(verdict(card()))
    assert "PSNR 40.5 dB in the mean and 40.0 at worst (picture 0)" in words
    assert "4.5 dB short of the noise floor (45.0 dB)" in words
    assert "Error enters in step 0" in words
    assert "27.0 dB, 13.0 dB short of the noise floor (40.0 dB); the worst step is 1 with 25.2 dB" in words
    assert "The worst of 4 layers: d (W8A8) 8.2 dB, c (W8A8) 18.2 dB, b (W8A8) 28.2 dB." in words
    assert "BROKEN" not in words


def test_a_layer_that_computes_something_else_breaks_the_verdict():
    broken = card_of([measured(0, layers={"a": 1e-4, "b": 1.0})], ORIGIN)
    assert is_broken(broken)
    assert not is_broken(card())
    assert any(sentence.startswith("BROKEN: 1 layer below 3.5 dB") for sentence in verdict(broken))
    require_sound(card(), where="quality.json")
    with pytest.raises(VerificationError, match="the checkpoint is broken") as caught:
        require_sound(broken, where="quality.json")
    assert (caught.value.where, caught.value.why.split(";")[0]) == ("quality.json", "'b' has -1.76 dB")


def test_a_verdict_without_pictures_says_so():
    words = verdict(card_of([measured()], ORIGIN))
    assert words[0].startswith("No picture was made")
    assert "PSNR" not in " ".join(words)
