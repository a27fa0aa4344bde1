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
from tests.support.forked_ranks import run_forked
from tests.support.tiny_models import build

WORKER = Path(__file__).with_name("quality_worker.py")

each_layout = pytest.mark.parametrize(("kind", "layout"), LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the cards that the ranks wrote."""
    folder = tmp_path_factory.mktemp("results")
    done = run_forked(2, WORKER, str(folder), timeout_s=240)
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
