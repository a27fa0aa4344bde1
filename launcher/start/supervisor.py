"""`python -m launcher --nproc_per_node N MODEL ...`: torchrun with an exit status that says what happened.

The ranks are started and watched by torchrun's own agent, in this process, with all of torchrun's flags (several
nodes, restarts). What torchrun leaves out is added: it ends with 1 whatever happened, calls a job that left in order
on SIGTERM a failure, and dies of SIGUSR1 without telling its ranks.

How: each rank writes its failure into the error file that the agent gives it; the earliest one is the job's end. A
rank that could not write any more (kill -9) is known to the agent by its signal.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launcher.cli.command_line import Command, RunJob, parse
from launcher.failure.error_file import pass_on, read_error_files
from launcher.failure.exit_codes import EXIT_CODES, ExitCode
from launcher.failure.failures import Failure, write_end
from launcher.failure.stop import GRACEFUL, Stopped, stopped_on
from launcher.journal.status import account_folder, format_time, read_status
from launcher.start.agent import agent_arguments, end_children, heard, run_agent
from launcher.start.supervisor_flags import split_at_command
from quant_core.errors import DistributedError, ExplainedError

_UNTOLD = ("it could not write down why, only end with the status of that kind", "read its output above")


def supervise(words: Sequence[str], entry: Sequence[str]) -> ExitCode:
    """Run a command on several ranks and return the exit status of the whole job.

    `entry` is what each rank runs in front of the command's words: `-m MODULE`, or a script.
    Raises ConfigurationError before any rank is started when the command makes no sense.
    """
    flags, command_words = split_at_command(words)
    command = parse(command_words)
    logging.disable(logging.CRITICAL)  # the agent's account of its workers repeats what they say
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="launcher_") as folder:
        arguments = agent_arguments(flags, [*entry, *command_words], Path(folder))
        reports = Path(arguments.log_dir)

        def leave(signal_name: str) -> NoReturn:  # from a thread, so this is the only way out
            status = _close(_end_on_signal(signal_name, reports, command, started), command, started)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(status)

        try:
            with heard(insist=end_children, leave=leave):
                run_agent(arguments)
            return ExitCode.PUBLISHED
        except ChildFailedError as error:
            failure = _first_failure(error, reports)
        except SignalException as error:
            failure = _end_on_signal(error.sigval.name, reports, command, started)
        except DistributedError as error:
            failure = _told(reports) or _say(error)
        finally:
            end_children()
    return _close(failure, command, started)


def _first_failure(error: ChildFailedError, reports: Path) -> Failure:
    """Return what the ranks say ended the job; what the agent saw if none of them could say anything."""
    told = read_error_files(reports)
    rank, process = error.get_first_failure()
    # The agent asks the others to leave when a rank has ended: that they did is no cause.
    others_left = told and isinstance(told[0].error(), Stopped) and rank not in [failure.rank for failure in told]
    if told and not others_left:
        return told[0]
    return _say(_ended_silently(rank, process.exitcode), rank)


def _ended_silently(rank: int, exitcode: int) -> ExplainedError:
    if name := _left_on(exitcode):
        return stopped_on(name, f"rank {rank}, starting")
    if known := next((kind for kind, code in EXIT_CODES.items() if code == exitcode), None):
        return Failure(rank, known.__name__, f"rank {rank} failed", f"rank {rank}", *_UNTOLD, time.time()).error()
    if exitcode >= 0:
        return ExplainedError(
            f"rank {rank} ended with status {exitcode} without a word",
            where=f"rank {rank}",
            why="this is a mistake of the program, not of yours",
            advice="report it with the output above",
        )
    return DistributedError(
        f"rank {rank} was ended by {signal.Signals(-exitcode).name}",
        where=f"rank {rank}",
        why="it was killed (kill -9, or the kernel for lack of memory) or crashed",
        advice="look for 'Killed process' in dmesg; then run the same command again: finished parts are reused",
    )


def _left_on(exitcode: int) -> str | None:
    """Return the signal that a rank left on before it could write anything; None when it ended otherwise."""
    by_status = {int(ExitCode.PREEMPTED): "SIGTERM", int(ExitCode.INTERRUPTED): "SIGINT"}
    return by_status.get(exitcode) or next((each.name for each in GRACEFUL if each == -exitcode), None)


def _end_on_signal(name: str, reports: Path, command: Command, started: float) -> Failure | None:
    """Return how the ranks ended after this process got a signal; None when they had finished by then."""
    if told := _told(reports):
        return told
    status = read_status(account_folder(command.config)) if isinstance(command, RunJob) else None
    if status is not None and status["state"] == "published" and status["updated"] >= format_time(started):
        return None
    return _say(stopped_on(name, "starting"))


def _told(reports: Path) -> Failure | None:
    """Return the failure that a rank wrote first, if any did."""
    return next(iter(read_error_files(reports)), None)


def _say(error: ExplainedError, rank: int = 0) -> Failure:
    """Print what no rank has said, and return it."""
    print(error, file=sys.stderr, flush=True)
    return Failure.of(error, rank)


def _close(failure: Failure | None, command: Command, started: float) -> ExitCode:
    if failure is None:
        return ExitCode.PUBLISHED
    if isinstance(command, RunJob):
        write_end(account_folder(command.config), started, failure)
    pass_on(failure)
    return failure.exit_code
