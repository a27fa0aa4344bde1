"""`python -m launcher` and `torchrun -m launcher`: read the command, run it, end with a status that tells the kind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.cli.command_line import Command, MergeFiles, parse
from launcher.config.job_config import JobConfig
from launcher.devices.kinds import use_only
from launcher.failure import stop
from launcher.failure.exit_codes import exit_code
from launcher.start.supervisor_flags import asks_for_ranks
from quant_core.errors import ExplainedError

# What the supervisor starts on every rank.
ENTRY = ("-m", "launcher")


def main(argv: Sequence[str] | None = None, entry: Sequence[str] = ENTRY) -> None:
    """Run one command and exit; every error is explained on the standard error, by one rank if all share it."""
    words = sys.argv[1:] if argv is None else argv
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    _leave_on_signals(rank)
    try:
        if asks_for_ranks(words):
            from launcher.start.supervisor import supervise

            sys.exit(supervise(words, entry))
        command = parse(words)
    except ExplainedError as error:
        _end(error, quiet=rank != "0")
    try:
        _execute(command)
    except (Exception, KeyboardInterrupt) as error:
        from launcher.failure.failures import explained

        told = explained(error)
        if type(told) is ExplainedError:  # a mistake of the program: the traceback is what its authors need
            import traceback

            traceback.print_exception(error)
        _end(told, quiet=told.shared and rank != "0")


def _leave_on_signals(rank: str) -> None:
    """End at once on a signal, until a watch listens: an exception would be lost inside an import of torch."""

    def leave(number: int, frame: object) -> None:
        error = stop.stopped_on(signal.Signals(number).name, f"rank {rank}, starting")
        if rank == "0":
            print(error, file=sys.stderr, flush=True)
        os._exit(exit_code(error))

    for number in stop.GRACEFUL:
        signal.signal(number, leave)
    stop.hear_interrupts()


def _execute(command: Command) -> None:
    # Not later: the thread that watches asks torch for its accelerator, and half of one ends the run.
    use_only("cpu" if isinstance(command, MergeFiles) else command.config.ranks.device)
    if isinstance(command, MergeFiles):
        from launcher.stages.merge import merge_files

        merge_files(command)
    else:
        _run_job(command.config)


def _run_job(config: JobConfig) -> None:
    """Run a job under watch; returns only when it is done."""
    from launcher.journal.logs import quiet_libraries
    from model_adapters.weights.offline import stay_offline

    stay_offline(config.pipeline.path)
    quiet_libraries()
    from launcher.failure.watch import Watch

    watch = Watch(config)
    watch.start()
    try:
        from launcher.run import run

        run(config, watch)
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)


def _end(error: BaseException, *, quiet: bool) -> NoReturn:
    """Exit at once: an orderly exit would wait for ranks that may be waiting for this one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from launcher.failure.error_file import write_error_file
        from launcher.failure.failures import Failure

        write_error_file(Failure.of(error, int(os.environ.get("RANK", "0"))), is_first=True)
    if not quiet:
        print(error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code(error))


if __name__ == "__main__":
    main()
