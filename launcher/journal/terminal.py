"""Write to the terminal so that losing it, or its standing still, never fails or delays a job.

The reader of a pipe (`| tee`, ssh) may be gone or stopped, a terminal may vanish, a descriptor be closed: `print` then
raises or waits for ever, and whoever ends the job prints too. So text goes into a list, which a thread of its own
empties into the descriptor; what cannot be passed on is lost. The logs of the ranks have it all the same.

A command whose product is what it prints waits for a reader that stands still, as any program does, until a job says
that it never does.
"""

from __future__ import annotations

import atexit
import io
import math
import os
import select
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue

# More than that many pieces of text are not kept for a reader that stands still.
_MOST = 1000
# How long a job waits for a reader, once: a loaded machine needs a moment, and nobody waits for a stopped one again.
_PATIENCE_S = 2.0


class Terminal(io.TextIOBase):
    """Stand in for `sys.stdout` or `sys.stderr` over one descriptor; no method raises, or waits longer than it may.

    What `earlier` was given before stands before this one's text, where both lead to the same place.
    """

    def __init__(self, descriptor: int, encoding: str, earlier: Terminal | None = None) -> None:
        self._descriptor, self._encoding, self._earlier = descriptor, encoding, earlier
        self._texts: deque[str] = deque()
        # A token for each text. Its `put` may be interrupted by a signal whose handler prints, as no lock may.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self.patience_s = math.inf
        self._is_stuck = False
        threading.Thread(target=self._pass_on, name="terminal", daemon=True).start()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What text is written as; letters that it lacks are written as their numbers."""
        return self._encoding

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Tell whether a person reads it."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Text is always taken."""
        return True

    def write(self, text: str) -> int:
        """Take a piece of text; it is lost when too much is waiting already, and goes on waiting."""
        if self._earlier:
            self._earlier.flush()
        if len(self._texts) >= _MOST:
            self.flush()
        if len(self._texts) < _MOST:
            self._texts.append(text)
            self._tokens.put(None)
        return len(text)

    def flush(self) -> None:
        """Wait until the text is passed on, but not for a reader that stood still the last time already."""
        until = time.monotonic() + (0.0 if self._is_stuck else self.patience_s)
        while self._texts and time.monotonic() < until:
            time.sleep(0.001)
        self._is_stuck = bool(self._texts)

    def _pass_on(self) -> None:
        while True:
            self._tokens.get()
            waiting = [self._texts[index] for index in range(len(self._texts))]
            self._write("".join(waiting).encode(self._encoding, errors="backslashreplace"))
            for _ in waiting:
                self._texts.popleft()

    def _write(self, content: bytes) -> None:
        while content:
            try:
                content = content[os.write(self._descriptor, content) :]
            except BlockingIOError:  # another program that shares it wants it so
                select.select([], [self._descriptor], [])
            except OSError:
                return


def survive_its_loss() -> None:
    """Let everything that this process prints go through a `Terminal`; call it before anything opens a file."""
    for descriptor in (0, 1, 2):
        _occupy(descriptor)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout = Terminal(1, encoding)
    sys.stderr = Terminal(2, encoding, earlier=sys.stdout)
    atexit.register(sys.stderr.flush)
    atexit.register(sys.stdout.flush)


def wait_for_no_reader() -> None:
    """From now on, lose what no reader takes within moments: this process does a job, which has to go on and to end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Terminal):
            stream.patience_s = _PATIENCE_S


def _occupy(descriptor: int) -> None:
    """Open a closed descriptor on nothing: else the next file that is opened gets its number, and the prints."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
