"""The real MindIE-SD, fetched once; where it cannot be had, tests that need it skip with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runtime.mindie import Unavailable, fetch

CACHE = Path(__file__).parents[2] / ".mindie_sd"


@pytest.fixture(scope="session")
def packages() -> Path:
    """Return the folder to import MindIE-SD from."""
    try:
        return fetch(CACHE)
    except Unavailable as reason:
        if os.environ.get("MINDIE_SD_REQUIRED"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))
