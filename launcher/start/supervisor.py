"""`python -m launcher --nproc_per_node N MODEL ...`: torchrun with an exit status that says what happened.

The ranks are started and watched by torchrun's own agent, in this process, with all of torchrun's flags (several
nodes, restarts). What torchrun leaves out is added: it ends with 1 whatever happened, calls a job that left in order
on SIGTERM a failure, and dies of SIGUSR1 without telling its ranks.

How: each rank writes its failure into the error file that the agent gives it; the earliest one is the job's end. A
rank that could not write any more (kill -9) is known to the agent by its signal.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launcher.config.job_config import JobConfig
from launcher.failure.error_file import read_error_files, write_error_file
from launcher.failure.exit_codes import EXIT_CODES, ExitCode
from launcher.failure.record import STARTING, Failure, write_end
from launcher.failure.signals import GRACEFUL, Stopped, stopped_on
from launcher.failure.way_out import leave, tell
from launcher.journal.status import account_folder, format_time, read_status
from launcher.journal.terminal import wait_for_no_reader
from launcher.start.agent import agent_arguments, end_children, let_children_leave, run_agent, signals_heard
from launcher.start.supervisor_flags import job_on_ranks, split_at_command
from quant_core.errors import DistributedError, ExplainedError

# A rank that has written down why it leaves says so next; signal upon signal would have it killed in between.
_LAST_WORDS_S = 0.5


def supervise(words: Sequence[str], entry: Sequence[str]) -> ExitCode:
    """Run a command on several ranks and return the exit status of the whole job.

    `entry` is what each rank runs in front of the command's words: `-m MODULE`, or a script.
    Raises ConfigurationError before any rank is started when the command makes no sense.
    """
    flags, command_words = split_at_command(words)
    config = job_on_ranks(command_words)
    wait_for_no_reader()
    logging.disable(logging.CRITICAL)  # the agent's account of its workers repeats what they say
    with tempfile.TemporaryDirectory(prefix="launcher_") as folder:
        arguments = agent_arguments(flags, [*entry, *command_words], Path(folder))
        job = _Job(config, Path(arguments.log_dir), time.time())

        def give_up(signal_name: str) -> NoReturn:  # from a thread, so an exception would end nothing
            end = job.end_on_signal(signal_name)
            job.write(end)
            leave(end, text="", account=lambda: shutil.rmtree(folder, ignore_errors=True))

        end: Failure | None = None
        try:
            with signals_heard(insist=end_children, give_up=give_up):
                run_agent(arguments)
        except ChildFailedError as error:
            end = job.first_failure(error)
        except SignalException as error:
            end = job.end_on_signal(error.sigval.name)
        except DistributedError as error:
            end = job.told_first() or _said(Failure.of(error, 0))
        finally:
            if job.told_first():
                let_children_leave(_LAST_WORDS_S)
            end_children()
    job.write(end)
    return end.exit_code if end else ExitCode.PUBLISHED


@dataclass(frozen=True)
class _Job:
    """What the ranks were started for, the folder of their error files, and when, in seconds of the epoch."""

    config: JobConfig
    reports: Path
    started: float

    def told_first(self) -> Failure | None:
        """Return the failure that a rank wrote first, if any did."""
        return next(iter(read_error_files(self.reports)), None)

    def first_failure(self, error: ChildFailedError) -> Failure:
        """Return what the ranks say ended the job; what the agent saw if none of them could say anything."""
        told = read_error_files(self.reports)
        rank, process = error.get_first_failure()
        # The agent asks the others to leave when a rank has ended: that they did is no cause.
        others_left = told and isinstance(told[0].error(), Stopped) and rank not in [failure.rank for failure in told]
        if told and not others_left:
            return told[0]
        return _said(_ended_silently(rank, process.exitcode))

    def end_on_signal(self, name: str) -> Failure | None:
        """Return how the ranks ended after this process got a signal; None when they had finished by then."""
        told = self.told_first()
        # A rank that takes longer than the agent has patience is killed, and the others say that it vanished.
        if told and not told.is_about_others:
            return told
        status = read_status(account_folder(self.config))
        if status is not None and status["state"] == "published" and status["updated"] >= format_time(self.started):
            return None
        return _said(replace(Failure.of(stopped_on(name), 0), where=STARTING))

    def write(self, end: Failure | None) -> None:
        """Write down how the job ended, for whoever looks, and where this process's own starter wants it."""
        if end is None:
            return
        if not self.config.output.dry_run:  # which has no account: what stands in the folder is a job's
            write_end(account_folder(self.config), self.started, end)
        write_error_file(end, is_first=True)


def _ended_silently(rank: int, exitcode: int) -> Failure:
    """Return what is known of a rank that could write nothing, by the status that its process ended with."""
    if -exitcode in GRACEFUL:
        return Failure.of(stopped_on(signal.Signals(-exitcode).name), rank, STARTING)
    where = f"rank {rank}"
    if known := next((kind for kind, code in EXIT_CODES.items() if code == exitcode), None):
        why = "it could not write down why, only end with the status of that kind"
        return Failure(rank, known.__name__, f"rank {rank} failed", where, why, "read its output above", time.time())
    if exitcode < 0:
        error: ExplainedError = DistributedError(
            f"rank {rank} was ended by {signal.Signals(-exitcode).name}",
            where=where,
            why="it was killed (kill -9, or the kernel for lack of memory) or crashed",
            advice="look for 'Killed process' in dmesg; then run the same command again: finished parts are reused",
        )
    else:
        error = ExplainedError(
            f"rank {rank} ended with status {exitcode} without a word",
            where=where,
            why="this is a mistake of the program, not of yours",
            advice="report it with the output above",
        )
    return Failure.of(error, rank)


def _said(failure: Failure) -> Failure:
    """Print what no rank has said, and return it."""
    tell(failure.error())
    return failure
