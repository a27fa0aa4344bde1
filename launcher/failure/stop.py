"""Being asked to stop: what a signal means, and the two ends that are no failure.

SIGTERM (a scheduler takes the cards away), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal is gone) ask the job to
finish what it is doing and leave. SIGINT asks the same; a second one ends the process where it stands. Before there
is anything to finish, any of them ends it at once.
"""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

from quant_core.errors import ExplainedError

GRACEFUL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(ExplainedError):
    """The job left on request with everything saved that was finished."""

    def __str__(self) -> str:
        return super().__str__().replace("error: ", "stopped: ", 1)


class Preempted(Stopped):
    """A scheduler or operator asked for the place; the same command continues the job."""


class Interrupted(Stopped):
    """The person at the terminal asked."""


def stopped_on(signal_name: str, where: str) -> Stopped:
    """Return the end that a signal asks for."""
    kind = Interrupted if signal_name == signal.SIGINT.name else Preempted
    return kind(
        f"{signal_name} asked the job to leave",
        where=where,
        why="what was finished is saved, and nothing is half-written",
        advice="run the same command again: it continues here",
    )


def listen() -> int:
    """Catch the signals of `GRACEFUL` and return a file descriptor from which their numbers can be read.

    The number is written by Python's C handler at once, so a thread learns of a signal although the main thread may
    be inside a collective for minutes. Call it in the main thread.
    """
    pipe = numbers()
    for number in GRACEFUL:
        signal.signal(number, _noticed)
    return pipe.readable


class Numbers(NamedTuple):
    """The ends of a pipe that the numbers of signals go through, whatever handles them."""

    readable: int
    writable: int

    def close(self) -> None:
        """Send the numbers nowhere again."""
        signal.set_wakeup_fd(-1)
        os.close(self.readable)
        os.close(self.writable)


def numbers() -> Numbers:
    """Open a pipe to which Python writes the number of each signal that has a handler; call it in the main thread."""
    pipe = Numbers(*os.pipe())
    for end in pipe:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(pipe.writable, warn_on_full_buffer=False)
    return pipe


def arrived(readable: int) -> list[signal.Signals]:
    """Return the signals that came since the last call."""
    try:
        return [signal.Signals(number) for number in os.read(readable, 64) if number in GRACEFUL]
    except BlockingIOError:
        return []


def hear_interrupts() -> None:
    """Let SIGINT through to this thread, also one that came while it was blocked; handle it before."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _noticed(number: int, frame: object) -> None:
    """Do nothing: the number is already in the pipe, and a thread reads it."""
