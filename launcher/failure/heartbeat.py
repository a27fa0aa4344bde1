"""Judge by their beats whether the other ranks live.

Every rank's watching thread counts up twice a second and reads the counts of the others. A count that stands still
means that the whole process stands still: stopped, swapped out, stuck in the kernel, or holding the interpreter's
lock in a library. Long work is no hang, because the thread goes on beating beside it; a rank that beats but never
comes to a collective is found by the collective's own limit (`--timeout_s`).

Worked example, `--hang_timeout 120`: rank 1 is frozen at 12:00:00. At 12:02:00 each other rank has seen its count
unchanged for 120 s *on its own clock* (clocks of hosts are never compared), and says so.

A process that is gone is known at once on its own host, by its pid; elsewhere by its silence, like a frozen one.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from launcher.devices.launch import Launch
from launcher.failure.board import Beat
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


def here() -> str:
    """Return a name for this host and process namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


@dataclass(frozen=True)
class Lost:
    """A rank that cannot go on, and what to say about it."""

    rank: int
    error: DistributedError


@dataclass
class Pulse:
    """Add up how long each other rank's count has stood still, in seconds; `now` is this process's monotonic clock.

    `start_limit_s` bounds the wait for a rank that has not come at all.
    """

    launch: Launch
    hang_limit_s: float
    start_limit_s: float
    now: float
    _counts: dict[int, int] = field(default_factory=dict)
    _silence: dict[int, float] = field(default_factory=dict)

    def look(self, beats: Mapping[int, Beat], now: float) -> Lost | None:
        """Return the lowest rank that is gone or silent for too long; None when all are well."""
        # A process that was stopped itself sees a long silence of all others that proves nothing.
        passed = min(now - self.now, _LONGEST_LOOK_S)
        self.now = now
        others = [rank for rank in range(self.launch.world) if rank != self.launch.rank]
        for rank in others:
            count = beats[rank].count if rank in beats else -1
            self._silence[rank] = self._silence[rank] + passed if self._counts.get(rank) == count else 0.0
            self._counts[rank] = count
        return next((lost for rank in others if (lost := self._judge(rank, beats.get(rank)))), None)

    def unreachable(self, beats: Mapping[int, Beat], limit_s: float) -> Lost | None:
        """Return the lowest rank that has been silent for `limit_s`, for a rank that lost a connection to somebody."""
        silent = (beat for rank, beat in sorted(beats.items()) if self._silence.get(rank, 0.0) > limit_s)
        return next((Lost(beat.rank, _unreachable(beat)) for beat in silent if not beat.finished), None)

    def _judge(self, rank: int, beat: Beat | None) -> Lost | None:
        silence = self._silence[rank]
        if beat is None:
            return Lost(rank, _never_came(rank, silence)) if silence > self.start_limit_s else None
        if beat.finished:
            return None
        if is_gone(beat):
            return Lost(rank, _vanished(beat))
        return Lost(rank, _hangs(beat, silence)) if silence > self.hang_limit_s else None


def is_gone(beat: Beat) -> bool:
    """Tell whether a rank's process has ended; False when it runs on another host, where nothing can be seen."""
    process = _process(beat)
    return beat.host == here() and (process is None or process.status() == psutil.STATUS_ZOMBIE)


def kill_frozen(beat: Beat) -> None:
    """End a frozen process of this host: it does not react to a polite signal, and would keep its card."""
    if beat.host == here() and _process(beat) is not None:
        os.kill(beat.pid, signal.SIGKILL)


def ask_for_stacks(beat: Beat) -> None:
    """Have a silent process of this host write the stacks of its threads, if it can still react."""
    if beat.host == here() and _process(beat) is not None:
        os.kill(beat.pid, signal.SIGUSR2)


def _process(beat: Beat) -> psutil.Process | None:
    """Return the rank's process on this host; another process with its number is not it."""
    try:
        found = psutil.Process(beat.pid)
        return found if abs(found.create_time() - beat.started) < 1 else None
    except psutil.Error:
        return None


def _at(beat: Beat) -> str:
    stage = f", {beat.stage}" + (f" {beat.done}/{beat.total}" if beat.total else "") if beat.stage else ""
    return f"rank {beat.rank}{stage}, process {beat.pid} on {beat.host.split()[0]}"


def _vanished(beat: Beat) -> DistributedError:
    return DistributedError(
        f"rank {beat.rank} vanished",
        where=_at(beat),
        why="its process ended without a word: it was killed (kill -9, or the kernel for lack of memory) or crashed",
        advice="look for 'Killed process' in dmesg; then run the same command again: finished parts are reused",
    )


def _hangs(beat: Beat, silence: float) -> DistributedError:
    process = _process(beat) if beat.host == here() else None
    state = _STATES.get(process.status(), f"its state is {process.status()}") if process else "its host may be down"
    return DistributedError(
        f"rank {beat.rank} hangs",
        where=_at(beat),
        why=f"no sign of life for {silence:.0f} s (--hang_timeout): {state}",
        advice="the stacks of the other ranks are in logs/; run the same command again: finished parts are reused",
    )


def _unreachable(beat: Beat) -> DistributedError:
    return DistributedError(
        f"rank {beat.rank} cannot be reached any more",
        where=_at(beat),
        why="a connection broke, and it has shown no sign of life since: its host is down, or the network to it",
        advice="look after that host; then run the same command again: finished parts are reused",
    )


def _never_came(rank: int, silence: float) -> DistributedError:
    return DistributedError(
        f"rank {rank} never came",
        where=f"rank {rank}, starting",
        why=f"no sign of life from it for {silence:.0f} s (--timeout_s)",
        advice="read that rank's output; check that all ranks were started",
    )
