"""A contact sheet shows pictures of any size, says how much it amplifies, and is the same file twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_adapters.quality.sheet import MOST_ROWS, Row, amplification, draw_sheet, write_sheet
from quant_core.errors import InputError

PROMPT = "a red star on a blue ground"


def picture(path: Path, width: int, height: int, level: int = 100) -> Path:
    y, x = np.mgrid[0:height, 0:width]
    Image.fromarray(np.stack([(x * 255) // width, (y * 255) // height, 0 * x + level], axis=2).astype(np.uint8)).save(
        path
    )
    return path


def row(folder: Path, width: int, height: int, prompt: str = PROMPT, off: int = 4) -> Row:
    return Row(
        prompt,
        "PSNR 40.0 dB",
        picture(folder / f"float_{width}x{height}.png", width, height),
        picture(folder / f"quantized_{width}x{height}_{off}.png", width, height, level=100 + off),
    )


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (257, 255), (1024, 1024), (1344, 768), (48, 640)])
def test_pictures_of_any_size_get_cells_of_one_size(size: tuple[int, int], tmp_path: Path):
    assert draw_sheet([row(tmp_path, *size)], title="t").size == draw_sheet([row(tmp_path, 32, 32)], title="t").size


def test_the_difference_is_amplified_as_far_as_it_stays_visible(tmp_path: Path):
    sheet = np.asarray(draw_sheet([row(tmp_path, 64, 64, off=4)], title="t"))
    # Blue differs by 4 everywhere: times 32 is 128, and 64 times would be white.
    assert (sheet == (0, 0, 128)).all(axis=2).sum() == 256 * 256


@pytest.mark.parametrize(("largest", "factor"), [(0, 64), (3, 64), (4, 32), (100, 2), (255, 1)])
def test_amplification_ends_before_the_largest_difference_is_white(largest: int, factor: int):
    assert amplification([np.full((8, 8, 3), largest)]) == factor


def test_a_few_outliers_do_not_darken_the_sheet():
    difference = np.full((100, 100, 3), 2)
    difference[:10, :2] = 255
    assert amplification([difference]) == 64


def test_the_same_pictures_and_words_give_the_same_bytes(tmp_path: Path):
    rows = [row(tmp_path, 64, 64), row(tmp_path, 32, 32)]
    first = write_sheet(tmp_path / "first.png", rows, title="a title").read_bytes()
    assert first == write_sheet(tmp_path / "second.png", rows, title="a title").read_bytes()
    assert Image.open(tmp_path / "first.png").format == "PNG"


@pytest.mark.parametrize("prompt", ["", "x" * 500, "a word and " * 200, "ein Löwe, 一只猫"])
def test_no_prompt_runs_into_the_pictures(prompt: str, tmp_path: Path):
    empty = np.asarray(draw_sheet([row(tmp_path, 64, 64, prompt="")], title="t"))
    sheet = np.asarray(draw_sheet([row(tmp_path, 64, 64, prompt=prompt)], title="t"))
    assert np.array_equal(sheet[:, 12 + 224 + 8 :], empty[:, 12 + 224 + 8 :])
    assert sheet.shape == empty.shape


def test_a_long_job_shows_its_first_pictures_and_says_so(tmp_path: Path):
    rows = [row(tmp_path, 16, 16)] * (MOST_ROWS + 1)
    heights = [
        Image.open(write_sheet(tmp_path / f"{count}.png", rows[:count], title="t")).height
        for count in (MOST_ROWS, MOST_ROWS + 1)
    ]
    assert heights[0] == heights[1]
    assert (tmp_path / f"{MOST_ROWS}.png").read_bytes() != (tmp_path / f"{MOST_ROWS + 1}.png").read_bytes()


def test_a_damaged_picture_is_named(tmp_path: Path):
    whole = row(tmp_path, 16, 16)
    whole.quantized.write_bytes(b"no png")
    with pytest.raises(InputError) as caught:
        draw_sheet([whole], title="t")
    assert str(whole.quantized) in str(caught.value)
