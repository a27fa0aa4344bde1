"""torchrun's own agent, which starts and watches the ranks of this host, and what it leaves out.

It waits for other hosts for minutes inside torch, where no handler written in Python runs; hosts that do not meet are
a traceback to it; and after an interrupt it waits for its ranks again, however often one interrupts.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError

from launcher.failure.signals import arrived, ignore_signals, on_signals
from launcher.start.supervisor_flags import RENDEZVOUS, flag_names
from quant_core.errors import ConfigurationError, DistributedError

# torchrun is told to pass Slurm's warning on, and to let ranks finish a batch of images after SIGTERM (30 s if not),
# unless the user says otherwise, by a flag or by torchrun's own variable.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_PATIENCE, _PATIENCE_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"
# How often signals are looked for: sooner than a person can ask why nothing happens.
_LOOK_S = 0.1
# How long the agent may take to leave once it has no ranks.
_ANSWER_S = 3.0


def agent_arguments(flags: Sequence[str], worker: Sequence[str], reports: Path) -> Any:
    """Return torchrun's arguments: the user's flags, what they leave open, and what each rank runs.

    Raises ConfigurationError for a number of ranks or a folder for their logs of which torchrun makes a traceback.
    """
    parser = torchrun.get_args_parser()
    names = [f"--{name.replace('_', '-')}" for name in flag_names(flags)]
    defaults = {"--signals-to-handle": _SIGNALS, "--shutdown-timeout": os.environ.get(_PATIENCE, _PATIENCE_S)}
    # Options that this torch does not know yet are left out.
    added = [f"{name}={value}" for name, value in defaults.items() if name not in names and _knows(parser, name)]
    # Where several hosts meet is the user's business; otherwise a free port of this host is chosen.
    if not any(name.startswith(RENDEZVOUS) for name in flag_names(flags)):
        added.append("--standalone")
    if "--log-dir" not in names:
        added.append(f"--log-dir={reports}")
    arguments = parser.parse_args([*flags, *added, *worker])
    _require_ranks(str(arguments.nproc_per_node))
    arguments.log_dir = _own_folder(Path(arguments.log_dir))
    return arguments


def _require_ranks(count: str) -> None:
    if re.fullmatch(r"-\d+|0+", count):
        raise ConfigurationError(
            f"--nproc_per_node {count} starts no rank",
            where="--nproc_per_node",
            why="it is the number of ranks on this host",
            advice="--nproc_per_node 1, or as many as there are devices",
        )


def _own_folder(logs: Path) -> str:
    """Make a folder for this run's logs, whose errors are those of no other job that is given the same `--log-dir`."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="run_", dir=logs)
    except OSError as error:
        raise ConfigurationError(
            f"'{logs}' can be no folder",
            where="--log-dir",
            why=f"what the ranks print goes there: {error.strerror}",
            advice="give another folder, or leave the flag out",
        ) from error


def run_agent(arguments: Any) -> None:
    """Start the ranks of this host and wait for their end.

    Raises:
        ChildFailedError, SignalException: as torchrun does.
        DistributedError: the hosts did not find or have lost each other.
        ConfigurationError: torchrun's flags make no sense.
    """
    try:
        torchrun.run(arguments)
    except (RendezvousError, dist.DistError) as error:
        raise _apart(arguments, error) from error
    except (ValueError, ImportError) as error:
        raise ConfigurationError(
            "torchrun cannot start ranks with these flags",
            where="the flags in front of the command",
            why=str(error),
            advice="see torchrun --help; on one host --nproc_per_node alone is enough",
        ) from error


@contextmanager
def signals_heard(insist: Callable[[], object], give_up: Callable[[str], object]) -> Iterator[None]:
    """See to it that signals have an effect although the agent has the main thread.

    They raise SignalException, as they do in the agent from the moment it starts ranks. For calls that let none through
    a thread listens too: `insist` is called when SIGINT comes a second time, `give_up` with a signal's name when the
    block goes on although it came, and no child process is there to wait for.

    Processes that the block starts have SIGINT blocked until they call `on_signals`: an interpreter that gets it before
    its first line of ours ends with a traceback of its own.
    """
    over = threading.Event()
    on_signals(_raise)
    thread = threading.Thread(target=_hear, args=(over, insist, give_up), name="signals", daemon=True)
    thread.start()  # before this thread blocks SIGINT: one thread of the process has to take it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        ignore_signals()  # how the job ends is known now; Slurm signals again when another host has ended
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
        thread.join()


def _raise(number: signal.Signals) -> NoReturn:
    raise SignalException("asked to leave", number)


def end_children() -> None:
    """Kill what is left of the processes that this one started."""
    for child in psutil.Process().children(recursive=True):
        child.kill()


def let_children_leave(seconds: float) -> None:
    """Give the processes that this one started some time to end by themselves; the agent asks for them no more."""
    psutil.wait_procs(psutil.Process().children(recursive=True), seconds)


def _hear(over: threading.Event, insist: Callable[[], object], give_up: Callable[[str], object]) -> None:
    seen: list[signal.Signals] = []
    unanswered = 0.0
    while not over.wait(_LOOK_S):
        seen += arrived()
        if seen.count(signal.SIGINT) > 1:
            insist()
        if not seen or psutil.Process().children():
            unanswered = time.monotonic()
        elif time.monotonic() - unanswered > _ANSWER_S:
            give_up(seen[0].name)


def _knows(parser: Any, option: str) -> bool:
    return option in parser.format_help()


def _apart(arguments: Any, error: Exception) -> DistributedError:
    place = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    return DistributedError(
        f"the hosts of --nnodes {arguments.nnodes} do not find each other",
        where=f"{place}, where they meet",
        why=next(iter(str(error.__cause__ or error).splitlines()), "not all of them came in time"),
        advice="start the same command on every host, with the same place to meet, and see that they reach its port",
    )
