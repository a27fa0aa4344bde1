"""Run a command and find out what it cost: its processes' own books, read before the last of them is gone.

Processor time and bytes are exact: the kernel adds those of each child that was waited for to its parent, so a zombie
that nobody has reaped yet holds the sum of its whole tree. Memory is not added up anywhere, so each process's peak is
read while it lives; the mark only grows, and what is missed is what grew in the last moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from scripts.bench.usage import moved, resident

ROOT = Path(__file__).resolve().parents[2]
# A clone that is not installed works as well, and what the caller has put there stays.
PYTHON_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
_SAMPLE_S = 0.1


@dataclass(frozen=True)
class Cost:
    """What one run used.

    peak_bytes: resident, of the rank that had most, its children included; of work in memory: above the model.
    called_bytes: what calls to read asked for, cached or not, while `read_bytes` came from the disk. resident_bytes:
    of each rank, at each moment (seconds since the epoch) that was looked at.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    read_bytes: int
    called_bytes: int
    written_bytes: int
    weights_bytes: int = 0
    resident_bytes: Mapping[int, Sequence[tuple[float, int]]] = field(default_factory=dict, repr=False)


class CommandFailed(RuntimeError):
    """Say which command failed, and the end of what it printed."""


def run(command: Sequence[str], environ: Mapping[str, str]) -> Cost:
    """Run a command to its end; a last line of JSON in its output replaces what was measured from outside.

    Raises CommandFailed when it does not end with 0.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watched = _Memory(process.pid)
    try:
        assert process.stdout is not None
        printed = process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall, io = time.monotonic() - start, moved(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        watched.stop()
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)}\nended with {process.returncode}:\n{printed[-3000:]}")
    told = _told(printed)
    if told:
        return Cost(**told)
    return Cost(
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=wall,
        peak_bytes=watched.most(),
        read_bytes=io["read_bytes"],
        called_bytes=io["rchar"],
        written_bytes=io["write_bytes"],
        resident_bytes=dict(watched.resident),
    )


def python(*words: str) -> list[str]:
    """Return the command that runs this Python with these words."""
    return [sys.executable, *words]


def _told(printed: str) -> dict[str, Any] | None:
    last = printed.strip().rpartition("\n")[2]
    return json.loads(last) if last.startswith("{") else None


class _Memory:
    """Sample the memory of a process's tree: of each rank with its children, or of all where there is no rank."""

    def __init__(self, pid: int) -> None:
        self.resident: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        self._peaks: dict[tuple[int, int], int] = {}
        self._ranks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(psutil.Process(pid),), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sample no more."""
        self._over.set()
        self._thread.join()

    def most(self) -> int:
        """Return the peak of the rank that had most: the peaks of its processes, added up."""
        totals: defaultdict[int, int] = defaultdict(int)
        for (rank, _), peak in self._peaks.items():
            totals[rank] += peak
        ranks = {rank: total for rank, total in totals.items() if rank >= 0} or totals
        return max(ranks.values(), default=0)

    def _sample(self, root: psutil.Process) -> None:
        while not self._over.wait(_SAMPLE_S):
            now: defaultdict[int, int] = defaultdict(int)
            for process in _tree(root):
                try:
                    rank = self._rank(process)
                    now[rank] += resident(process.pid)
                    self._peaks[rank, process.pid] = resident(process.pid, "peak")
                except (psutil.Error, OSError, ValueError):
                    continue  # a process that is ending
            for rank, size in now.items():
                self.resident[rank].append((time.time(), size))

    def _rank(self, process: psutil.Process) -> int:
        if process.pid not in self._ranks:
            self._ranks[process.pid] = int(process.environ().get("RANK", -1))
        return self._ranks[process.pid]


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
