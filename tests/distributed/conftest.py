"""What several files of this folder share, each started once, also when several processes share the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from scripts.make_tiny_pipeline import write_prompts
from tests.support.forked_ranks import run_forked
from tests.support.ranks import folder_of, run_on_ranks
from tests.support.tiny_job import run_job
from tests.support.torchrun import Finished, run_torchrun

# Modules that compare what two ranks compute, each its part, with what one computes.
COMPARED_WITH_ONE = tuple(
    f"tests.distributed.test_{name}_parallel" for name in ("deployed", "estimators", "fa3", "smoothing")
)


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that has a folder of that name filled by the first who asks for it, and returns it."""

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base if worker_id == "master" else base.parent) / name
        whole = folder / "whole"
        with FileLock(f"{folder}.lock"):
            if not whole.exists():
                unfinished = folder / worker_id
                shutil.rmtree(unfinished, ignore_errors=True)  # of a filling that failed
                unfinished.mkdir(parents=True)
                fill(unfinished)
                unfinished.rename(whole)
        return whole

    return made


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """Folder of what two ranks wrote for the module of the test."""
    everything = made_once("two_ranks", lambda folder: run_on_ranks(2, folder, *COMPARED_WITH_ONE))
    return folder_of(everything, request.module.__name__)


@dataclass(frozen=True)
class PublishedJob:
    """A job of two ranks that nothing disturbed: its command's flags, its folders, and what it printed."""

    folder: Path
    prompts: Path
    flags: tuple[str, ...]

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout.txt").read_text()


@pytest.fixture(scope="session")
def job_on_two_ranks(made_once: Callable[..., Path]) -> Callable[..., PublishedJob]:
    """Return a function that has two ranks run a job of that name, model, pipeline and flags, once."""

    def job(
        name: str, model: str, pipeline: Path, *flags: str, start: Callable[..., Finished] = run_forked
    ) -> PublishedJob:
        def run(out: Path) -> None:
            finished = run_job(2, model, pipeline, write_prompts(out / "calib_prompts.txt"), out, *flags, start=start)
            (out / "stdout.txt").write_text(finished.stdout)

        folder = made_once(name, run)
        return PublishedJob(folder, folder / "calib_prompts.txt", flags)

    return job


@pytest.fixture(scope="session")
def dual_timestep_job(tiny_flux_folder: Path, job_on_two_ranks: Callable[..., PublishedJob]) -> PublishedJob:
    """FLUX under torchrun on two ranks, the dual-card layout, per-timestep scales; read it, or run it again."""
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_timestep")
    return job_on_two_ranks("dual_timestep_job", "flux", tiny_flux_folder, *flags, start=run_torchrun)


@pytest.fixture(scope="session")
def dual_smoothed_job(tiny_flux_folder: Path, job_on_two_ranks: Callable[..., PublishedJob]) -> PublishedJob:
    """FLUX on two ranks with smoothed dynamic layers and scales of attention."""
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic_fa3", "--anti_method", "m4")
    return job_on_two_ranks("dual_smoothed_job", "flux", tiny_flux_folder, *flags)


@pytest.fixture(scope="session")
def dual_sd3_job(tiny_sd3_folder: Path, job_on_two_ranks: Callable[..., PublishedJob]) -> PublishedJob:
    """SD3 on two ranks, one copy over both, static layers of a float16 model."""
    return job_on_two_ranks("dual_sd3_job", "sd3", tiny_sd3_folder)
