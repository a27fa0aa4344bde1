"""Write what happens to `logs/rank<n>.jsonl`, one JSON object a line, and keep other libraries off the terminal.

Third-party bars, advice and warnings come once per rank and hide the one line that matters. They go to the log of
their rank; the terminal belongs to the console.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant_core.atomic_file import FILE_MODE, make_folder

LOGS = "logs"
_OURS = logging.getLogger("launcher")
_LIBRARIES = ("diffusers", "transformers", "accelerate", "huggingface_hub", "torch", "torchvision", "py.warnings")


class JsonLines(logging.Formatter):
    """Format a log record as one line of JSON: time, run, rank, level, where from, the text, and `extra` fields."""

    def __init__(self, rank: int, run: str) -> None:
        super().__init__()
        self._rank, self._run = rank, run

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)) + f".{record.msecs:03.0f}",
            "run": self._run,
            "rank": self._rank,
            "level": record.levelname.lower(),
            "from": record.name,
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def log(text: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Add a line to this rank's log, if it has one yet."""
    _OURS.log(level, text, extra={"fields": fields}, exc_info=error)


def open_log(folder: Path, rank: int, run: str) -> Path:
    """Begin to log into `folder`/logs, and have the stacks of all threads written there on SIGUSR2.

    run: what tells the lines of this run from those of others, which append to the same file, maybe at the same time.
    """
    path = make_folder(folder / LOGS) / f"rank{rank}.jsonl"
    logging.raiseExceptions = False  # a full disk must not add a traceback for every line that is lost
    handler = logging.StreamHandler(open(_private(path), "a", encoding="utf-8", buffering=1))  # noqa: SIM115
    handler.setFormatter(JsonLines(rank, run))
    for name in (_OURS.name, *_LIBRARIES):
        logging.getLogger(name).addHandler(handler)
    faulthandler.register(signal.SIGUSR2, open(_private(stacks_file(folder, rank)), "a"), all_threads=True)  # noqa: SIM115
    return path


def stacks_file(folder: Path, rank: int) -> Path:
    """Return where the stacks of a rank's threads go."""
    return folder / LOGS / f"rank{rank}.stacks.txt"


def dump_stacks(folder: Path, rank: int) -> None:
    """Write the stacks of all threads of this process."""
    with contextlib.suppress(OSError), open(_private(stacks_file(folder, rank)), "a") as file:
        file.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S')}, process {os.getpid()}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def quiet_libraries() -> None:
    """Send what other libraries say to this rank's log instead of the terminal, and switch their bars off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning per fork
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    _OURS.setLevel(logging.INFO)
    for name in (_OURS.name, *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())  # else the last resort prints to the terminal
        logger.propagate = False


def quiet_diffusers() -> None:
    """Switch off the bars and terminal handlers that diffusers and transformers install when they are imported."""
    for library in _hugging_face():
        library.disable_progress_bar()
        library.disable_default_handler()


def _hugging_face() -> Iterator[Any]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    yield from (diffusers_logging, transformers_logging)


def _private(path: Path) -> Path:
    """Create the file with the mode that all output has, whatever the umask."""
    path.touch(mode=FILE_MODE)
    path.chmod(FILE_MODE)
    return path
