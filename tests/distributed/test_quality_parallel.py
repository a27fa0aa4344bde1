"""Two ranks that evaluate a part each find what one rank finds, and notice files of swapped ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_adapters.quality.card import QualityCard, read_card
from model_adapters.quality.measured import card_of
from model_adapters.quality.verdict import is_broken
from quant_core import quant_model
from tests.distributed.quality_worker import LAYOUTS, SCHEME, measure, origin
from tests.distributed.test_deployed_parallel import session
from tests.support.evaluation import make_subject
from tests.support.tiny_models import build
from tests.support.torchrun import run_torchrun

WORKER, PICTURES_WORKER = (Path(__file__).with_name(f"{name}_worker.py") for name in ("quality", "pictures"))

each_layout = pytest.mark.parametrize(("kind", "layout"), LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the cards that the ranks of one torchrun wrote."""
    folder = tmp_path_factory.mktemp("results")
    done = run_torchrun(2, WORKER, str(folder), timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def of_one_rank(kind: str, folder: Path) -> QualityCard:
    """Quantize and evaluate the whole model."""
    whole = build(kind)
    files = quant_model(whole, session(kind, SCHEME, folder)).files
    assert files is not None
    return card_of([measure(build(kind), kind, files)], origin(kind))


@pytest.mark.distributed
@each_layout
def test_a_divided_model_has_the_card_of_a_whole_one(kind: str, layout: str, results: Path, tmp_path: Path):
    divided, whole = read_card(results / f"{kind}_{layout}.json"), of_one_rank(kind, tmp_path)
    assert [layer.name for layer in divided.layers] == [layer.name for layer in whole.layers]
    differences = [two.sqnr - one.sqnr for two, one in zip(divided.layers, whole.layers)]
    # Column-split layers have the same codes and scales; row-split ones have a scale a rank, which is a little better.
    assert sum(abs(difference) <= 0.05 for difference in differences) > len(differences) / 2
    assert all(abs(difference) < 2 for difference in differences)
    assert divided.output_sqnr == pytest.approx(whole.output_sqnr, abs=1.5)
    assert divided.output_floor_sqnr == pytest.approx(whole.output_floor_sqnr, abs=1.5)
    assert not is_broken(divided)


@pytest.mark.distributed
@each_layout
def test_files_of_swapped_ranks_are_refused_by_every_rank(kind: str, layout: str, results: Path):
    for rank in range(2):
        assert "bias" in (results / f"swapped_{kind}_{layout}_{rank}.txt").read_text()


@pytest.mark.distributed
@each_layout
def test_layers_of_swapped_ranks_are_found_broken_even_if_nothing_refuses_them(kind: str, layout: str, results: Path):
    swapped = read_card(results / f"swapped_{kind}_{layout}.json")
    assert is_broken(swapped)
    assert swapped.worst_layers[0].sqnr < 0


@pytest.mark.distributed
def test_two_copies_of_two_ranks_paint_what_one_rank_paints(tiny_sd3_folder: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star on a blue ground\na green ring on a yellow ground\n")
    prompts.chmod(0o640)
    done = run_torchrun(4, PICTURES_WORKER, str(tiny_sd3_folder), str(prompts), str(tmp_path), timeout_s=280)
    assert done.returncode == 0, done.stderr[-4000:]
    subject = make_subject("sd3", tiny_sd3_folder, prompts, SCHEME, tmp_path / "one")
    divided, whole = read_card(tmp_path / "card.json"), subject.card(subject.evaluate(tmp_path / "one_quality"))
    assert [(each.number, each.prompt, each.seed) for each in divided.pictures] == [
        (each.number, each.prompt, each.seed) for each in whole.pictures
    ]
    assert divided.mean is not None
    assert whole.mean is not None
    # Not equal: each of two ranks has its own scales in a row-split layer, which is 2 dB better on two pictures.
    assert divided.mean.psnr == pytest.approx(whole.mean.psnr, abs=4)
    assert divided.mean.ssim == pytest.approx(whole.mean.ssim, abs=0.03)
    assert divided.output_sqnr == pytest.approx(whole.output_sqnr, abs=2)
    # The float models differ by the order in which parts of a sum are rounded.
    assert divided.mean_floor is not None
    assert whole.mean_floor is not None
    assert divided.mean_floor.psnr == pytest.approx(whole.mean_floor.psnr, abs=2)
    assert len(list((tmp_path / "quality").glob("*/*.png"))) == 3 * len(whole.pictures)
