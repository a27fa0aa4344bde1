"""`python -m launcher` and `torchrun -m launcher`: read the command, run it, end with a status that tells the kind."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.command_line import Command, MergeFiles, parse
from launcher.exit_codes import exit_code
from quant_core.errors import ExplainedError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit; every error is explained on the standard error, by one rank if all share it."""
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
    except ExplainedError as error:
        _end(error, quiet=rank != "0")
    try:
        _execute(command)
    except (Exception, KeyboardInterrupt) as error:
        from launcher.failures import explained

        told = explained(error)
        if type(told) is ExplainedError:  # a mistake of the program: the traceback is what its authors need
            import traceback

            traceback.print_exception(error)
        _end(told, quiet=told.shared and rank != "0")


def _execute(command: Command) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    if isinstance(command, MergeFiles):
        from launcher.stages.merge import merge_files

        merge_files(command)
        return
    from launcher.run import run

    record(run)(command.config)


def _end(error: BaseException, *, quiet: bool) -> NoReturn:
    """Exit at once: an orderly exit would wait for ranks that may be waiting for this one."""
    if not quiet:
        print(error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code(error))


if __name__ == "__main__":
    main()
