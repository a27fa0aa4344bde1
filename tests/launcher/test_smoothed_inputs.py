"""What is noted of smoothed inputs is read back for the job that noted it, and anything else counts as nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.files.smoothed_inputs import copy_smoothed, read_smoothed, smoothed_text
from quant_core.smoothing.channels import Channels, SmoothedInput

DIVIDED = SmoothedInput(("a.q", "a.k"), before=Channels(123.456789, 0.5), after=Channels(2.0, 0.125))
TEXT = smoothed_text([DIVIDED], "f")


def test_it_is_read_back_with_as_many_digits_as_anybody_reads(tmp_path: Path):
    (tmp_path / "told").write_text(TEXT)
    [found] = read_smoothed(tmp_path / "told", "f")
    assert found.layers == ("a.q", "a.k")
    assert (found.before.largest, found.before.middle, found.after.largest, found.after.middle) == (
        123.5,
        0.5,
        2,
        0.125,
    )
    assert found.bits == pytest.approx(3.95, abs=0.01)  # 247 times the middle before, 16 times after


def test_a_job_that_divided_nothing_writes_nothing():
    assert smoothed_text([], "f") == ""


@pytest.mark.parametrize("text", [None, "", "{", TEXT.replace('"f"', '"g"'), TEXT[:-20], TEXT.replace("123.5", "null")])
def test_a_file_that_is_missing_damaged_or_of_another_job_says_nothing(text: str | None, tmp_path: Path):
    if text is not None:
        (tmp_path / "told").write_text(text)
    assert read_smoothed(tmp_path / "told", "f") == ()


def test_a_copy_of_the_checkpoint_has_it_as_its_own(tmp_path: Path):
    (tmp_path / "told").write_text(TEXT)
    copy_smoothed(tmp_path / "told", "f", tmp_path / "copy", "g")
    copy_smoothed(tmp_path / "nothing", "f", tmp_path / "none", "g")
    assert read_smoothed(tmp_path / "copy", "g") == read_smoothed(tmp_path / "told", "f")
    assert not (tmp_path / "none").exists()


def test_a_maximum_that_left_its_range_fails_no_job_and_is_not_drawn(tmp_path: Path):
    infinite = SmoothedInput(("a",), before=Channels(float("inf"), 1.0), after=Channels(1.0, 1.0))
    (tmp_path / "told").write_text(smoothed_text([infinite], "f"))
    assert read_smoothed(tmp_path / "told", "f") == ()
