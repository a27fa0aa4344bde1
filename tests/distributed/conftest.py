"""What several files of this folder share: one start of two ranks for all comparisons with one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.ranks import folder_of, run_on_ranks

# Modules that compare what two ranks compute, each its part, with what one computes.
COMPARED_WITH_ONE = tuple(
    f"tests.distributed.test_{name}_parallel" for name in ("deployed", "estimators", "fa3", "smoothing")
)


@pytest.fixture(scope="session")
def results_of_two_ranks(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder with what two ranks wrote, by module; started once, also when several processes share the tests."""
    if worker_id == "master":
        return run_on_ranks(2, tmp_path_factory.mktemp("two_ranks"), *COMPARED_WITH_ONE)
    shared = tmp_path_factory.getbasetemp().parent / "two_ranks"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            unfinished = shared.with_name(f"two_ranks_by_{worker_id}")
            unfinished.mkdir()
            run_on_ranks(2, unfinished, *COMPARED_WITH_ONE).rename(shared)
    return shared


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, results_of_two_ranks: Path) -> Path:
    """Folder of what the ranks wrote for the module of the test."""
    return folder_of(results_of_two_ranks, request.module.__name__)
