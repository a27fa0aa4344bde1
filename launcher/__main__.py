"""`python -m launcher` and `torchrun -m launcher`: read the command, run it, end with a status that tells the kind."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence

from launcher.cli.command_line import parse
from launcher.devices.host_memory import use_large_pages
from launcher.devices.launch import Launch, read_launch
from launcher.failure.record import STARTING, Failure
from launcher.failure.signals import on_signals, stopped_on
from launcher.failure.way_out import finish, leave
from launcher.journal.terminal import survive_its_loss
from launcher.start.supervisor_flags import asks_for_ranks
from quant_core.errors import EnvironmentFailure, ExplainedError

# What the supervisor starts on every rank.
ENTRY = ("-m", "launcher")

# Importing torch and diffusers makes a million objects that stay. Python's own threshold, 700, has them looked through
# for garbage again and again, a seventh of the time that importing takes.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


def main(argv: Sequence[str] | None = None, entry: Sequence[str] = ENTRY) -> None:
    """Run one command and exit; every error is explained on the standard error, by one rank if all share it."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    use_large_pages()
    survive_its_loss()
    words = sys.argv[1:] if argv is None else argv
    launch = _launch()
    rank = launch.rank if launch else 0

    def speaks() -> bool:
        return rank == 0

    def leave_on(number: signal.Signals) -> None:  # an exception would be lost inside an import of torch
        leave(Failure.of(stopped_on(number.name), rank, STARTING), speaks=speaks)

    on_signals(leave_on)
    try:
        if asks_for_ranks(words):
            from launcher.start.supervisor import supervise

            finish(supervise(words, entry))
        command = parse(words)
    except ExplainedError as error:  # every rank has the same words, so it is as well the first one's
        leave(Failure.of(error, 0), text=str(error), speaks=speaks)
    try:
        command.run(launch)
    except (Exception, KeyboardInterrupt) as error:
        leave(Failure.of(error, rank, STARTING if launch and launch.is_distributed else ""))
    finish()


def _launch() -> Launch | None:
    """Return which rank this is; None where the variables contradict each other, which a job refuses by itself."""
    try:
        return read_launch(os.environ)
    except EnvironmentFailure:
        return None


if __name__ == "__main__":
    main()
