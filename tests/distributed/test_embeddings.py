"""Embeddings are on all ranks of a copy, each tensor once, and gone when nobody reads them any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_ranks import run_forked

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("embeddings_worker.py")
PROMPTS = 4


def held(ranks: int, pipeline: Path, prompts: Path, out: Path, *flags: str) -> list[Any]:
    """Return what each rank held after encoding and after calibrating."""
    done = run_forked(
        ranks, WORKER, out, "sd3", "--sd3_model_path", pipeline, "--device", "cpu", "--prompt_path", prompts,
        "--width", "64", "--height", "64", "--infer_steps", "1", "--do_quant", "--quant_weight_save_folder", out / "w",
        "--quant_dump_calib_folder", out / "c", "--save_path", out / "images", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_both_ranks_hold_the_negative_prompt_once_and_after_calibrating_nothing(
    tiny_sd3_folder: Path, prompt_file: Path, tmp_path: Path
):
    [first, second] = held(2, tiny_sd3_folder, prompt_file, tmp_path)
    assert first == second
    encoded, left = first
    assert {name: count for name, (count, _) in encoded.items()} == {
        "prompt_embeds": PROMPTS,
        "negative_prompt_embeds": 1,
        "pooled_prompt_embeds": PROMPTS,
        "negative_pooled_prompt_embeds": 1,
    }
    assert left == {}


def test_images_that_follow_keep_the_embeddings(tiny_sd3_folder: Path, prompt_file: Path, tmp_path: Path):
    [[encoded, left]] = held(1, tiny_sd3_folder, prompt_file, tmp_path, "--do_save_img")
    assert left == encoded
