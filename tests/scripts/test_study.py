"""The study measures each cell once, and its table says mean and spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.study import subject
from scripts.study.__main__ import FLOAT, ROOT, Study, main, text
from scripts.study.grid import Method, chosen, full
from scripts.study.table import markdown


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_each_method_of_the_study_is_allowed_and_asked_for_once(kind: str):
    methods = list(chosen(kind))
    assert all(method.is_allowed for method in methods)
    assert len(set(methods)) == len(methods)
    assert set(methods) <= set(full())


def test_the_table_has_mean_and_deviation_over_seeds():
    method = {"scheme": "w8a8", "smoothing": "m4", "estimator": "mse", "numerics": "float32"}
    cells = [{"model": "sd3", "seed": seed, **method, "psnr": psnr, "right": 0.5} for seed, psnr in ((0, 30), (1, 34))]
    row = list(markdown(cells))[-1]
    assert row == "| w8a8 | m4 | mse | float32 |  |  |  | 32.0 ± 2.8 |  |  | 50 ± 0 |"


def test_a_cell_is_measured_once_and_one_that_was_cut_short_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "CALIBRATED", 1)  # prompts; weights alone are quantized
    study, methods = Study(tmp_path, pictures=1), [Method("w8a16")]
    study.measure("sd3", 0, methods)
    floating, quantized = study.cells()
    assert floating.items() >= FLOAT.items()
    assert floating["psnr"] > quantized["psnr"] > 30
    assert quantized["right"] == floating["right"] == 1
    before = study.file.read_text()
    study.measure("sd3", 0, methods)
    assert study.file.read_text() == before
    study.file.write_text(before[:-9])  # a cut leaves no end of line
    assert study.cells() == [floating]
    study.measure("sd3", 0, methods)
    assert study.file.read_text() == before
    assert Study(tmp_path, pictures=2).cells() == []
    assert "| w8a16 | none | minmax | float32 |" in "\n".join(text([floating, quantized], 1))


def test_a_model_is_measured_with_fewer_pictures_after_one_with_more(tmp_path: Path):
    """A batch of fewer pictures must not be compared with the latents of a larger one."""
    for pictures in (2, 1):
        measured = subject.Subject("sd3", subject.MODELS / "sd3", 0, pictures, tmp_path, steps=1)
        found = measured.psnrs(measured.transformer, fingerprint=f"the {pictures}. look")
        assert len(found) == pictures
        assert min(found) > 30


def test_the_table_goes_into_the_work_folder_and_not_over_the_one_that_is_published(tmp_path: Path):
    published = (ROOT / "scripts" / "study.md").read_bytes()
    assert main(["--table", "--work", str(tmp_path)]) == 0
    assert (ROOT / "scripts" / "study.md").read_bytes() == published
    assert (tmp_path / "study.md").read_text().startswith("# What quantization does")
    assert main(["--table", "--work", str(tmp_path), "--out", str(tmp_path / "other.md")]) == 0
    assert (tmp_path / "other.md").read_bytes() == (tmp_path / "study.md").read_bytes()
