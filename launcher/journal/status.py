"""`status.json`: how the job stands, for whoever looks from outside, while it runs and after it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from launcher.config.job_config import JobConfig
from launcher.failure.board import Beat
from launcher.failure.exit_codes import ExitCode
from launcher.failure.failures import Failure
from quant_core.atomic_file import write_text_atomically

STATUS = "status.json"
State = Literal["running", "published", "failed", "preempted", "interrupted"]
_STATES: dict[ExitCode, State] = {
    ExitCode.PUBLISHED: "published",
    ExitCode.PREEMPTED: "preempted",
    ExitCode.INTERRUPTED: "interrupted",
}
_RANK_FIELDS = ("rank", "stage", "done", "total", "step", "memory", "host", "pid")


def account_folder(config: JobConfig) -> Path:
    """Return where a run keeps its status and its logs: beside the weights, or the images if it makes no weights."""
    return config.output.quant_weight_save_folder or config.output.save_path


def write_running(folder: Path, started: float, beats: Iterable[Beat]) -> None:
    """Say that the job runs, and where each rank is."""
    ranks = [{name: getattr(beat, name) for name in _RANK_FIELDS} for beat in beats]
    _write(folder, {"state": "running", "started": format_time(started), "ranks": ranks})


def write_ended(folder: Path, started: float, failure: Failure | None) -> None:
    """Say how the job ended: published, or with the failure that came first."""
    code = failure.exit_code if failure else ExitCode.PUBLISHED
    told = {**asdict(failure), "at": format_time(failure.at)} if failure else None
    _write(
        folder,
        {
            "state": _STATES.get(code, "failed"),
            "exit_code": int(code),
            "started": format_time(started),
            "error": told,
        },
    )


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return what the last run wrote, or None when there is nothing that can be read."""
    try:
        return json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps({"version": 1, "updated": format_time(time.time()), **content}, indent=1) + "\n"
    # Nothing depends on this file, so a read-only disk must not hide the error that it would tell.
    with contextlib.suppress(OSError):
        try:
            write_text_atomically(folder / STATUS, text)
        except OSError:
            _overwrite(folder / STATUS, text)


def _overwrite(path: Path, text: str) -> None:
    """Write where the old text stands: a full disk has no room for a second file, but still has the first one's."""
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()


def format_time(seconds: float) -> str:
    """Return a time of the epoch in ISO 8601, local with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
