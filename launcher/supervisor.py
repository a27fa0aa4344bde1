"""`python -m launcher --nproc_per_node N MODEL ...`: torchrun with an exit status that says what happened.

The ranks are started and watched by torchrun's own agent, in this process, with all of torchrun's flags (several
nodes, restarts). What torchrun leaves out is added: it ends with 1 whatever happened, calls a job that left in order
on SIGTERM a failure, and dies of SIGUSR1 without telling its ranks.

How: each rank writes its failure into the error file that the agent gives it; the earliest one is the job's end. A
rank that could not write any more (kill -9) is known to the agent by its signal.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launcher.command_line import Command, RunJob, parse
from launcher.error_file import pass_on, read_error_files
from launcher.exit_codes import EXIT_CODES, ExitCode
from launcher.failures import Failure
from launcher.status import account_folder, format_time, read_status, write_ended
from launcher.stop import GRACEFUL, Stopped, on_second_interrupt, stopped_on
from launcher.supervisor_flags import split_at_command
from quant_core.errors import DistributedError, ExplainedError

# Where several hosts meet is the user's business; otherwise a free port of this host is chosen.
_RENDEZVOUS = ("nnodes", "rdzv", "master", "node_rank", "standalone")
# What torchrun is told unless the user says otherwise: pass Slurm's warning on, and let ranks finish a batch of images
# after SIGTERM (30 s by default). Options that this torch does not know yet are left out.
_UNTOLD = ("it could not write down why, only end with the status of that kind", "read its output above")
_DEFAULTS = {"--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout": "300"}


def supervise(words: Sequence[str], entry: Sequence[str]) -> ExitCode:
    """Run a command on several ranks and return the exit status of the whole job.

    `entry` is what each rank runs in front of the command's words: `-m MODULE`, or a script.
    Raises ConfigurationError before any rank is started when the command makes no sense.
    """
    flags, command_words = split_at_command(words)
    command = parse(command_words)
    logging.disable(logging.CRITICAL)  # the agent's account of its workers repeats what they say
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="launcher_") as reports:
        arguments = _torchrun_arguments(flags, [*entry, *command_words], Path(reports))
        try:
            with on_second_interrupt(_end_children):  # the agent would go on waiting for an orderly end
                torchrun.run(arguments)
            return ExitCode.PUBLISHED
        except ChildFailedError as error:
            failure = _first_failure(error, Path(arguments.log_dir))
        except SignalException as error:
            failure = _end_on_signal(error, Path(arguments.log_dir), command, started)
        finally:
            _end_children()
    return _close(failure, command, started)


def _torchrun_arguments(flags: Sequence[str], worker: Sequence[str], reports: Path) -> Any:
    parser = torchrun.get_args_parser()
    names = [flag.split("=", 1)[0].replace("_", "-") for flag in flags]
    added = [f"{name}={value}" for name, value in _DEFAULTS.items() if name not in names and _knows(parser, name)]
    if not any(name.lstrip("-").replace("-", "_").startswith(_RENDEZVOUS) for name in names):
        added.append("--standalone")
    if "--log-dir" not in names:
        added.append(f"--log-dir={reports}")
    return parser.parse_args([*flags, *added, *worker])


def _knows(parser: Any, option: str) -> bool:
    return option in parser.format_help()


def _first_failure(error: ChildFailedError, reports: Path) -> Failure:
    """Return what the ranks say ended the job; what the agent saw if none of them could say anything."""
    told = read_error_files(reports)
    rank, process = error.get_first_failure()
    # The agent asks the others to leave when a rank has ended: that they did is no cause.
    others_left = told and isinstance(told[0].error(), Stopped) and rank not in [failure.rank for failure in told]
    if told and not others_left:
        return told[0]
    failure = Failure.of(_ended_silently(rank, process.exitcode), rank)
    print(failure.error(), file=sys.stderr)
    return failure


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


def _end_on_signal(error: SignalException, reports: Path, command: Command, started: float) -> Failure | None:
    """Return how the ranks ended after this process passed a signal on; None when they had finished by then."""
    if told := read_error_files(reports):
        return told[0]
    status = read_status(account_folder(command.config)) if isinstance(command, RunJob) else None
    if status is not None and status["state"] == "published" and status["updated"] >= format_time(started):
        return None
    failure = Failure.of(stopped_on(error.sigval.name, "starting"), 0)
    print(failure.error(), file=sys.stderr)
    return failure


def _close(failure: Failure | None, command: Command, started: float) -> ExitCode:
    if failure is None:
        return ExitCode.PUBLISHED
    if isinstance(command, RunJob):
        write_ended(account_folder(command.config), started, failure)
    pass_on(failure)
    return failure.exit_code


def _end_children() -> None:
    """Kill what is left: nothing, unless a second signal interrupted the orderly end."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
