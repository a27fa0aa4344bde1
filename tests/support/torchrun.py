"""Start real torchrun for a test, and leave nothing behind: every process it started is gone when this returns."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# What torchrun gives its workers to end by themselves before it kills them is 30 s; here nobody waits for that.
_GRACE_S = 3


@dataclass(frozen=True)
class Finished:
    """How a torchrun ended; `returncode` is None when it was killed after its time was up."""

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_launcher(
    *words: object, namespace: Sequence[str] = (), python_path: Sequence[Path] = ()
) -> subprocess.Popen[str]:
    """Start `python -m launcher WORDS...` with one pipe for all it prints, for a test that meddles with it."""
    command = [*namespace, sys.executable, "-m", "launcher", *map(str, words)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *python_path]))}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_torchrun(
    ranks: int,
    *command: str | Path,
    timeout_s: float = 120,
    environ: Mapping[str, str] | None = None,
    torchrun_flags: Sequence[str] = (),
    python: str | Path = sys.executable,
) -> Finished:
    """Run `torchrun --standalone --nproc_per_node RANKS COMMAND...` from the repository's root.

    COMMAND is a script and its words, or "-m", "module", its words. Ranks compute with one thread each.
    """
    words = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [*torchrun_flags, *map(str, command)]
    start = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        returncode: int | None = process.returncode
    except subprocess.TimeoutExpired:
        _end(process)
        stdout, stderr = process.communicate()
        returncode = None
    except BaseException:
        _end(process)
        raise
    return Finished(returncode, stdout, stderr, time.monotonic() - start)


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process, without those of a torchrun around it, for one that a test starts."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **added}


def _end(process: subprocess.Popen[str]) -> None:
    """End torchrun and its workers: each worker leads a session of its own, so no group kill reaches them all."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_GRACE_S)
    for survivor in alive:
        survivor.kill()
