"""The ways out of a process: of one that cannot go on or shall not, and of one that has done its work."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from launcher.failure.error_file import write_error_file
from launcher.failure.exit_codes import ExitCode
from launcher.failure.record import Failure

# Held by the thread that leaves; the same thread may come again, out of a signal.
_leaving = threading.RLock()
# Within this time the process is gone, whatever hangs on the way (a disk, a terminal).
_LIMIT_S = 8.0


def leave(
    failure: Failure | None,
    *,
    speaks: Callable[[], bool] = lambda: True,
    account: Callable[[], object] = lambda: None,
    text: str | None = None,
) -> NoReturn:
    """Say how it ended (None: well) and end the process at once: an orderly exit would wait for other ranks.

    `speaks` tells whether this process tells the whole story, in its error file and on the terminal; `text` is what it
    prints in place of the failure's traceback and four lines. `account` writes down what only the caller knows. A
    second thread that wants to leave waits here for the end.
    """
    with _leaving:
        status = failure.exit_code if failure else ExitCode.PUBLISHED
        try:
            _leave_within(_LIMIT_S, status)
            is_first = speaks()
            with suppress(Exception):
                account()
            if failure:
                write_error_file(failure, is_first=is_first)
            if failure and is_first and text != "":
                _print(failure, text)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def finish(status: int = ExitCode.PUBLISHED) -> NoReturn:
    """End a process that has done its work: whoever asked to be told of the end is, and nothing is taken apart.

    Taking apart what torch and diffusers have imported, a million objects, takes the interpreter most of a second.
    """
    atexit._run_exitfuncs()
    os._exit(status)


def _leave_within(seconds: float, status: int) -> None:
    clock = threading.Timer(seconds, os._exit, [status])
    clock.daemon = True
    clock.start()


def tell(text: object) -> None:
    """Print on stderr with the newline in the same write: other ranks have the same terminal."""
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _print(failure: Failure, text: str | None) -> None:
    tell(f"{failure.traceback}{failure.error()}" if text is None else text)
