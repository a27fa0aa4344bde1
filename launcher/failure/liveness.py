"""Judge by their heartbeats whether the other ranks live.

Every rank's monitor counts up twice a second and reads the counts of the others. A count that stands still
means that the whole process stands still: stopped, swapped out, stuck in the kernel, or holding the interpreter's
lock in a library. Long work is no hang, because the heart is a thread of its own; a rank that lives but never comes to
a collective is found by the collective's own limit (`--timeout_s`).

Worked example, `--hang_timeout 120`: rank 1 is frozen at 12:00:00. At 12:02:00 each other rank has seen its count
unchanged for 120 s *on its own clock* (clocks of hosts are never compared), and says so.

A process that is gone is known at once on its own host, by its pid; elsewhere by its silence, like a frozen one.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher.devices.launch import Launch
from launcher.failure.record import STARTING, Failure
from launcher.failure.shared_state import Heartbeat
from quant_core.errors import DistributedError

# Between two looks of a healthy process lies half a second; on a crowded machine, more. Longer gaps count as this.
_LONGEST_LOOK_S = 2.0
# What the kernel's letter for a silent process means for whoever looks for the cause.
_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped (SIGSTOP, or a debugger)",
    psutil.STATUS_TRACING_STOP: "its process is stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "its process waits inside the kernel, as it does for a disk or a network file system",
    psutil.STATUS_RUNNING: "its process is running without letting its threads work: a library holds the interpreter",
    psutil.STATUS_SLEEPING: "its process sleeps without letting its threads work: a library holds the interpreter",
}
_ENDED = "its process ended without a word: it was killed (kill -9, or the kernel for lack of memory) or crashed"
_AGAIN = "run the same command again: finished parts are reused"
# How long a frozen process gets to write the stacks of its threads.
_STACKS_S = 0.5


def here() -> str:
    """Return a name for this host and process namespace: hosts may share a hostname, but no start of a kernel."""
    try:
        seen = [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    except OSError:
        seen = []
    return " ".join([socket.gethostname(), *seen])


@dataclass
class Liveness:
    """Add up how long each other rank's count has stood still, in seconds; `now` is this process's monotonic clock.

    `start_limit_s` bounds the wait for a rank that has not come at all.
    """

    launch: Launch
    hang_limit_s: float
    start_limit_s: float
    now: float
    _counts: dict[int, int] = field(default_factory=dict)
    _silence: dict[int, float] = field(default_factory=dict)

    def look(self, heartbeats: Mapping[int, Heartbeat], now: float) -> Failure | None:
        """Return what is wrong with the lowest rank that is gone or silent for too long; None when all are well."""
        # A process that was stopped itself sees a long silence of all others that proves nothing.
        passed = min(now - self.now, _LONGEST_LOOK_S)
        self.now = now
        others = [rank for rank in range(self.launch.world) if rank != self.launch.rank]
        for rank in others:
            count = heartbeats[rank].count if rank in heartbeats else -1
            self._silence[rank] = self._silence[rank] + passed if self._counts.get(rank) == count else 0.0
            self._counts[rank] = count
        return next((lost for rank in others if (lost := self._judge(rank, heartbeats.get(rank)))), None)

    def unreachable(self, heartbeats: Mapping[int, Heartbeat], limit_s: float) -> Failure | None:
        """Return the lowest rank that has been silent for `limit_s`, for a rank that lost a connection to somebody."""
        for rank, heartbeat in sorted(heartbeats.items()):
            if self._silence.get(rank, 0.0) > limit_s and not heartbeat.finished:
                why = "a connection broke, and it has shown no sign of life since: its host is down, or the network"
                return _lost(heartbeat, "cannot be reached any more", why, f"look after that host; then {_AGAIN}")
        return None

    def _judge(self, rank: int, heartbeat: Heartbeat | None) -> Failure | None:
        silence = self._silence[rank]
        if heartbeat is None:
            return _never_came(rank, silence) if silence > self.start_limit_s else None
        if heartbeat.finished:
            return None
        if is_gone(heartbeat):
            return _lost(heartbeat, "vanished", _ENDED, f"look for 'Killed process' in dmesg; then {_AGAIN}")
        if silence > self.hang_limit_s:
            why = f"no sign of life for {silence:.0f} s (--hang_timeout): {_state(heartbeat)}"
            return _lost(heartbeat, "hangs", why, f"the stacks of the other ranks are in logs/; {_AGAIN}", frozen=True)
        return None


def is_gone(heartbeat: Heartbeat) -> bool:
    """Tell whether a rank's process has ended; False when it runs on another host, where nothing can be seen."""
    return heartbeat.host == here() and _status(heartbeat) in (None, psutil.STATUS_ZOMBIE)


def end_frozen(heartbeat: Heartbeat) -> None:
    """End a frozen process of this host, which does not react to a polite signal and would keep its card.

    Before that it is asked for the stacks of its threads, which it can still write unless it was stopped.
    """
    for number, patience_s in ((signal.SIGUSR2, _STACKS_S), (signal.SIGKILL, 0.0)):
        if not is_gone(heartbeat) and heartbeat.host == here():
            os.kill(heartbeat.pid, number)
            time.sleep(patience_s)


def _status(heartbeat: Heartbeat) -> str | None:
    """Return the kernel's status of a rank's process on this host; None when it is gone.

    Another process with its number is not it; one that must not be looked at is there.
    """
    try:
        found = psutil.Process(heartbeat.pid)
        return found.status() if abs(found.create_time() - heartbeat.started) < 1 else None
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return "unknown"


def _state(heartbeat: Heartbeat) -> str:
    status = _status(heartbeat) if heartbeat.host == here() else None
    return _STATES.get(status, f"its state is {status}") if status else "its host may be down"


def _lost(heartbeat: Heartbeat, how: str, why: str, advice: str, *, frozen: bool = False) -> Failure:
    return Failure(
        heartbeat.rank,
        DistributedError.__name__,
        f"rank {heartbeat.rank} {how}",
        f"process {heartbeat.pid} on {heartbeat.host.split()[0]}",
        why,
        advice,
        time.time(),
        stage=heartbeat.work,
        is_frozen=frozen,
    )


def _never_came(rank: int, silence: float) -> Failure:
    return Failure(
        rank,
        DistributedError.__name__,
        f"rank {rank} never came",
        "",
        f"no sign of life from it for {silence:.0f} s (--timeout_s)",
        "read that rank's output; check that all ranks were started",
        time.time(),
        stage=STARTING,
    )
