"""Fixtures of all tests: one thread, no network, and tiny pipelines made once a session by the product's own script."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

# Before anything imports huggingface_hub or torch: both read these when they load. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are not an installed package

from hypothesis import settings

# Nothing of what collecting the tests imports is garbage; without looking for it, that takes a sixth less.
gc.disable()
# The same examples in every run, so a failure is the fault of a change; `--hypothesis-profile default` explores.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections of garbage: a job asks for two, a fifth of its time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Compute with one thread again: a job that ran in this process chose its own number, which moves last bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what jobs remember of files out of the user's cache folder, here and in the processes of a test."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the layout of FLUX.1-dev, bfloat16; shared, so do not write into it."""
    from scripts.make_tiny_pipeline import make_tiny_pipeline

    return make_tiny_pipeline("flux", tmp_path_factory.mktemp("pipelines") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the layout of stable-diffusion-3-medium-diffusers, float16; do not write into it."""
    from scripts.make_tiny_pipeline import make_tiny_pipeline

    return make_tiny_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "tiny-sd3")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Return a file of four prompts, one a line, mode 0640."""
    from scripts.make_tiny_pipeline import write_prompts

    return write_prompts(tmp_path / "calib_prompts.txt")
