"""The measures of pictures agree with the implementations that their papers' readers use."""

from __future__ import annotations

import numpy as np
import pytest

from model_adapters.quality.flip import flip, flip_map
from model_adapters.quality.metrics import psnr, similarity, ssim
from quant_core.errors import InputError
from quant_core.quality.ratio import LIMIT_DB


def pattern() -> np.ndarray:
    y, x = np.mgrid[0:32, 0:32]
    return np.stack([x * 8, y * 8, (x * y) % 256], axis=2).astype(np.uint8)


def inverted_corner(picture: np.ndarray) -> np.ndarray:
    other = picture.copy()
    other[8:16, 8:16] = 255 - other[8:16, 8:16]
    return other


def noisy(picture: np.ndarray, amount: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(picture.shape)
    return np.clip(picture / 255 + amount * noise, 0, 1)


def test_psnr_of_a_known_error_is_what_its_definition_says():
    grey = np.full((16, 16, 3), 100, dtype=np.uint8)
    assert psnr(grey, grey + 1) == pytest.approx(20 * np.log10(255))  # 48.13: an error of one level everywhere
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(25.5))


def test_figures_of_a_fixed_pair_are_those_of_the_public_implementations():
    first, second = pattern(), inverted_corner(pattern())
    # scikit-image 0.26: gaussian_weights=True, use_sample_covariance=False, sigma=1.5, data_range=1, channel_axis=2
    assert ssim(first, second) == pytest.approx(0.7637400614440866, abs=1e-9)
    # flip-evaluator 1.7, LDR, float32
    assert flip(first, second) == pytest.approx(0.10743054747581482, abs=1e-5)


@pytest.mark.parametrize("amount", [0.002, 0.05, 0.5])
def test_flip_equals_the_authors_own_pixel_by_pixel(amount: float):
    flip_evaluator = pytest.importorskip("flip_evaluator", reason="no wheel for this processor")
    first, second = pattern() / 255, noisy(pattern(), amount)
    pixels, mean, _ = flip_evaluator.evaluate(
        first.astype(np.float32), second.astype(np.float32), "LDR", applyMagma=False
    )
    assert flip(first, second) == pytest.approx(mean, abs=1e-5)
    assert np.abs(flip_map(first, second).numpy() - pixels.squeeze()).max() < 1e-4


def test_equal_pictures_are_perfect_in_every_measure():
    found = similarity(pattern(), pattern())
    assert (found.psnr, found.ssim, found.flip) == (LIMIT_DB, 1.0, 0.0)


def test_the_worst_pair_is_near_the_end_of_every_scale():
    black, white = np.zeros((16, 16, 3)), np.ones((16, 16, 3))
    assert psnr(black, white) == 0
    assert ssim(black, white) < 0.001
    assert flip(black, white) > 0.95


def test_more_noise_is_worse_in_every_measure():
    found = [similarity(pattern(), noisy(pattern(), amount)) for amount in (0.01, 0.05, 0.2)]
    assert [each.psnr for each in found] == sorted((each.psnr for each in found), reverse=True)
    assert [each.ssim for each in found] == sorted((each.ssim for each in found), reverse=True)
    assert [each.flip for each in found] == sorted(each.flip for each in found)


def test_bytes_and_fractions_of_the_same_picture_measure_alike():
    first, second = pattern(), inverted_corner(pattern())
    assert similarity(first, second) == similarity(first / 255, second / 255)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (np.zeros((16, 16, 3)), np.zeros((16, 24, 3)), "16 x 16 and 24 x 16"),
        (np.zeros((16, 16)), np.zeros((16, 16)), "no picture"),
        (np.zeros((16, 16, 3), dtype=np.int64), np.zeros((16, 16, 3), dtype=np.int64), "int64"),
        (np.zeros((8, 16, 3)), np.zeros((8, 16, 3)), "16 x 8 pixels is too small"),
    ],
)
def test_what_is_no_pair_of_pictures_is_refused(first: np.ndarray, second: np.ndarray, says: str):
    with pytest.raises(InputError, match=says):
        similarity(first, second)
