"""Hand a failure to whoever started this rank, in the form that torchrun's agent reads.

torchrun prints the message of the first error file in its summary, so the four lines appear there instead of a
traceback; the supervisor finds the exit status in it, which torchrun itself drops.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from launcher.failure.record import Failure

_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def write_error_file(failure: Failure, *, is_first: bool) -> None:
    """Write the failure where the environment says; a rank that only follows dates itself after the first one."""
    path = os.environ.get(_VARIABLE)
    if not path:
        return
    text = str(failure.error()) if is_first else f"left because rank {failure.rank} failed: {failure.what}"
    timestamp = int(failure.at) + (not is_first)
    extra = {"timestamp": str(timestamp), "failure": failure.brief()}
    # The place may be a device or a mount (Kubernetes' termination log), where renaming is impossible.
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def read_error_files(folder: Path) -> list[Failure]:
    """Return the failures that the ranks of the last attempt below `folder` have written, the earliest first."""
    found = [failure for path in _last_attempt(folder) if (failure := _read(path)) is not None]
    return sorted(found, key=lambda failure: failure.at)


def _last_attempt(folder: Path) -> list[Path]:
    # By the folders that the agent makes, for ranks that were killed write no file.
    attempts = {int(path.name.removeprefix("attempt_")): path for path in folder.glob("**/attempt_*")}
    return list(attempts[max(attempts)].glob("*/error.json")) if attempts else []


def _read(path: Path) -> Failure | None:
    try:
        return Failure.from_fields(json.loads(path.read_text())["message"]["extraInfo"]["failure"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
