"""Fetching MindIE-SD: once, and with a reason where it is not to be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.mindie import Unavailable, fetch


def test_a_wheel_that_cannot_be_downloaded_is_a_reason_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unavailable, match=r"mindiesd==3\.1\.0") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_was_fetched_is_python_and_its_licence_and_is_not_fetched_again(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch(packages.parent) == packages
    # Tests import it, so an earlier run has left compiled files beside it.
    files = [path for path in packages.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert {path.suffix for path in files} == {".py", ".md"}
    assert packages / "mindiesd" / "quantization" / "layer.py" in files
