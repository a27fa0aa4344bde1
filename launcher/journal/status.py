"""`status.json`: how the job stands, for whoever looks from outside, while it runs and after it ended."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from launcher.config.job_config import JobConfig
from quant_core.atomic_file import write_text_atomically

STATUS = "status.json"
# A job that runs writes its status every two seconds.
_MOMENT_S = 10.0
# So much of an error's texts has room where the status of a running job stood.
_CUT = 60


def account_folder(config: JobConfig) -> Path:
    """Return where a run keeps its status and its logs: beside the weights, or the images if it makes no weights."""
    return config.output.quant_weight_save_folder or config.output.save_path


def write_status(folder: Path, state: str, started: float, **details: Any) -> None:
    """Say how the job stands, `started` being the time it began, in seconds of the epoch; a failed write is no error.

    state: "running" (`run` names it, `ranks` says where each is), "published", "failed", "preempted" or "interrupted"
        (`exit_code`, and `error`, which is None when there was none).
    """
    now = format_time(time.time())
    told = {"version": 1, "updated": now, "state": state, "started": format_time(started), **details}
    # Nothing depends on this file, so a read-only disk must not hide the error that it would tell.
    with contextlib.suppress(OSError):
        try:
            write_text_atomically(folder / STATUS, _text(told))
        except OSError:
            _overwrite(folder / STATUS, told)


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return what the last run wrote, or None when there is nothing that can be read."""
    try:
        return json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_kept(folder: Path, run: str | None = None) -> bool:
    """Tell whether a job that runs keeps the status, another one than `run`: it said so a moment ago."""
    told = read_status(folder) or {}
    if told.get("state") != "running" or told.get("run") == run:
        return False
    with contextlib.suppress(OSError):
        return time.time() - (folder / STATUS).stat().st_mtime < _MOMENT_S
    return False


def _overwrite(path: Path, told: dict[str, Any]) -> None:
    """Write where the old text stands, all or the little that fits there: a full disk has no room for a second file."""
    brief = {name: value for name, value in told.items() if name not in ("ranks", "error")}
    error = {name: told["error"][name][:_CUT] for name in ("what", "where")} if told.get("error") else None
    for each in (told, brief | {"error": error}, brief):
        with contextlib.suppress(OSError), path.open("r+", encoding="utf-8") as file:
            file.write(_text(each))
            file.truncate()
            return


def _text(told: dict[str, Any]) -> str:
    return json.dumps(told, indent=1) + "\n"


def format_time(seconds: float) -> str:
    """Return a time of the epoch in ISO 8601, local with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
