"""Being asked to stop: what a signal means, and the two ends that are no failure.

SIGTERM (a scheduler takes the cards away), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal is gone) ask the job to
finish what it is doing and leave. SIGINT asks the same; a second one ends the process where it stands. Before there
is anything to finish, any of them ends it at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quant_core.errors import ExplainedError

# How often the thread that counts interrupts looks: sooner than a person can ask why nothing happens.
_LOOK_S = 0.1
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
    readable, _ = _numbers()
    for number in GRACEFUL:
        signal.signal(number, _noticed)
    return readable


def _numbers() -> tuple[int, int]:
    """Return the ends of a pipe that the numbers of signals go through, whatever handles them; the first reads."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable, writable


def arrived(readable: int) -> list[signal.Signals]:
    """Return the signals that came since the last call."""
    try:
        return [signal.Signals(number) for number in os.read(readable, 64) if number in GRACEFUL]
    except BlockingIOError:
        return []


@contextmanager
def on_second_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in a thread when SIGINT comes a second time inside the block, whatever handles the signal.

    Processes that the block starts have SIGINT blocked until they call `hear_interrupts`: an interpreter that gets it
    before its first line of ours ends with a traceback of its own.
    """
    pipe, over = _numbers(), threading.Event()

    def count() -> None:
        hear_interrupts()  # one thread of this process has to
        seen = 0
        while not over.wait(_LOOK_S):
            seen += arrived(pipe[0]).count(signal.SIGINT)
            if seen > 1:
                act()
                return

    thread = threading.Thread(target=count, name="interrupts", daemon=True)
    thread.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
        thread.join()
        signal.set_wakeup_fd(-1)
        for end in pipe:
            os.close(end)


def hear_interrupts() -> None:
    """Let SIGINT through to this thread, also one that came while it was blocked; handle it before."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _noticed(number: int, frame: object) -> None:
    """Do nothing: the number is already in the pipe, and a thread reads it."""
