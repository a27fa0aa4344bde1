"""Being asked to stop: what a signal means, and the two ends that are no failure.

SIGTERM (a scheduler takes the cards away), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal is gone) ask the job to
finish what it is doing and leave. SIGINT asks the same; a second one ends the process where it stands. Before there
is anything to finish, any of them ends it at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from quant_core.errors import ExplainedError

GRACEFUL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# The ends of the one pipe of this process, once there is one: to read, to write.
_pipe: list[int] = []


class Stopped(ExplainedError):
    """The job left on request with everything saved that was finished."""

    def __str__(self) -> str:
        return super().__str__().replace("error: ", "stopped: ", 1)


class Preempted(Stopped):
    """A scheduler or operator asked for the place; the same command continues the job."""


class Interrupted(Stopped):
    """The person at the terminal asked."""


def stopped_on(signal_name: str) -> Stopped:
    """Return the end that a signal asks for."""
    kind = Interrupted if signal_name == signal.SIGINT.name else Preempted
    return kind(
        f"{signal_name} asked the job to leave",
        why="what was finished is saved, and nothing is half-written",
        advice="run the same command again: it continues here",
    )


def on_signals(react: Callable[[signal.Signals], object]) -> None:
    """From now on, call `react` for each signal of `GRACEFUL`, in place of what was called so far.

    Python calls it in the main thread, which may be inside a collective for minutes; so a signal's number also goes
    through a pipe at once, for a thread to read by `arrived`. SIGINT is let through, also one that came while it was
    blocked. Call it in the main thread.
    """
    if not _pipe:
        _pipe.extend(os.pipe())
        for end in _pipe:
            os.set_blocking(end, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for each in GRACEFUL:
        signal.signal(each, lambda number, _frame: react(signal.Signals(number)))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def ignore_signals() -> None:
    """From now on let no signal of `GRACEFUL` have an effect, also while the interpreter itself goes down."""
    for each in GRACEFUL:
        signal.signal(each, signal.SIG_IGN)


def arrived() -> list[signal.Signals]:
    """Return the signals that came since the last call."""
    try:
        return [signal.Signals(number) for number in os.read(_pipe[0], 64) if number in GRACEFUL] if _pipe else []
    except BlockingIOError:
        return []
