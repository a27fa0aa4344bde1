"""Run a whole job on a tiny pipeline, on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.forked_ranks import run_forked
from tests.support.torchrun import Finished

# Denoising steps of `run_job`.
STEPS = 4


def run_job(
    ranks: int,
    model: str,
    pipeline: Path,
    prompts: Path,
    out: Path,
    *flags: str | Path,
    check: bool = True,
    start: Callable[..., Finished] = run_forked,
) -> Finished:
    """Run the launcher's job of `model` on a tiny pipeline: small images, few steps; its files go below `out`.

    `start` is `run_torchrun` for a job as a user starts it.
    """
    path_flag = "--sd3_model_path" if model == "sd3" else "--path"
    finished = start(
        ranks, "-m", "launcher", model, path_flag, pipeline, "--device", "cpu", "--prompt_path", prompts,
        "--width", "64", "--height", "64", "--infer_steps", str(STEPS), "--do_quant",
        "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps", *flags,
    )  # fmt: skip
    if check:
        assert finished.returncode == 0, finished.stderr
        assert_sound(out / "weights")
    return finished


def assert_sound(folder: Path) -> None:
    """Check that nothing is wrong with what a job published in a folder, if it did."""
    from launcher.inspection.verify import verify  # takes seconds

    if (folder / "quant_manifest.json").exists():
        assert verify(folder).findings == []
