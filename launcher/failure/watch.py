"""Watch over one rank's run: beat, notice signals and lost ranks, and end the process with the first failure's words.

A thread does it, because the main thread may be inside a collective for minutes. Twice a second it

    posts this rank's beat and progress        reads the signals that arrived and passes the request to all ranks
    reads the first failure, and leaves        looks whether another rank vanished or hangs

Two ways lead out of a run. At a *safe point* (a batch saved, a record replayed) the ranks agree to stop and all leave
in order. On a *failure* nobody waits: the first rank that posts it on the board speaks, and every other leaves with
its words and its exit status, wherever it is. Killing a rank anywhere is safe, because no file appears under its
final name before it is whole.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from launcher.config.job_config import JobConfig
from launcher.devices import kinds
from launcher.devices.launch import Launch, read_launch
from launcher.failure import stop
from launcher.failure.board import Beat, Board, Stores, connect
from launcher.failure.error_file import write_error_file
from launcher.failure.exit_codes import ExitCode
from launcher.failure.failures import Failure, write_end
from launcher.failure.heartbeat import Lost, Pulse, ask_for_stacks, here, kill_frozen
from launcher.journal import logs, status
from launcher.journal.console import Console
from quant_core.errors import DistributedError

_INTERVAL_S = 0.5
# What `status.json` says of each rank.
_SHOWN = ("rank", "stage", "done", "total", "step", "memory", "host", "pid")
# The stage until the ranks have formed their groups: there is nothing to finish yet.
_STARTING = "starting"
# How long the cause of a lost connection may take to show: a beat of the watching thread, and the kernel's clean-up.
_CAUSE_S = 3.0
# Within that time, how long a silence is no accident.
_SILENCE_S = 2.0


class Watch:
    """Know where this rank is, tell the others, and end the process when the job cannot go on."""

    def __init__(self, config: JobConfig) -> None:
        self.folder = status.account_folder(config)
        self.launch: Launch = read_launch(os.environ)
        self.stores: Stores = connect(self.launch, config.ranks.timeout_s)
        self.console = Console(speaks=self.launch.rank == 0, note=self._note)
        self._started = time.time()
        process = psutil.Process()
        self._beat = Beat(self.launch.rank, 0, process.pid, process.create_time(), here(), _STARTING)
        self._beats: dict[int, Beat] = {}
        limits = float(config.ranks.hang_timeout), float(config.ranks.timeout_s)
        self._pulse = Pulse(self.launch, *limits, now=time.monotonic())
        self._signals: int | None = None
        self._interrupts = 0
        self._asked: str | None = None
        self._leaving = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @property
    def board(self) -> Board:
        """What all ranks can read at any moment."""
        return self.stores.board

    def start(self) -> None:
        """Begin to watch, and to catch signals; call it in the main thread."""
        with suppress(OSError):  # a folder that cannot be made is the output's error, told where it is needed
            logs.open_log(self.folder, self.launch.rank)
        self._signals = stop.listen()
        self._say_running([self._beat])
        self._thread.start()

    def enter(self, stage: str) -> None:
        """Note which stage this rank is in."""
        self._beat = replace(self._beat, stage=stage, done=0, total=0, step=None)
        logs.log(f"begins: {stage}", stage=stage)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Note and show how far this rank is in a stage."""
        self._beat = replace(self._beat, stage=stage, done=done, total=total, step=None)
        self.console.progress(stage, done, total)

    def step(self, stage: str, step: int, steps: int) -> None:
        """Note and show the denoising step inside the unit of work that `progress` counts."""
        self._beat = replace(self._beat, stage=stage, step=step)
        self.console.progress(stage, self._beat.done, self._beat.total, part=step / steps)

    def safe_point(self, group: dist.ProcessGroup | None) -> None:
        """Leave here if anybody asked; all ranks of the group call it at the same point and decide alike.

        Raises:
            Stopped: the request, on all ranks of the group.
        """
        self._listen()  # a fast stage would be over before the thread looks again
        asked = self._asked is not None
        if group is not None:
            flag = torch.tensor([int(asked)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            asked = bool(flag.item())
        if asked:
            name = self._asked or self.board.stop_asked() or "SIGTERM"
            raise stop.stopped_on(name, self._where())

    def finish(self) -> None:
        """Stop watching after success; rank 0 says that the job is done."""
        self._beat = replace(self._beat, finished=True, stage="finished")
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.board.beat(self._beat)
        self.console.close()
        if self.launch.rank == 0:
            write_end(self.folder, self._started, None)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an exception in its main thread, or because of what caused that."""
        first = self._cause_elsewhere(error) or self._claim(self._located(Failure.of(error, self.launch.rank)))
        self._leave(first, error)

    def _run(self) -> None:
        try:
            while not self._over.wait(_INTERVAL_S):
                self._tick()
        except (RuntimeError, OSError) as error:
            # The store is gone: its host (the agent, or rank 0) ended or is frozen.
            host = "rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else "torchrun"
            self._leave(self._located(Failure.of(_store_lost(host, error), self.launch.rank)), error)

    def _tick(self) -> None:
        self._listen()
        self._beat = replace(self._beat, count=self._beat.count + 1, memory=_memory(self.launch.local_rank))
        self.board.beat(self._beat)
        self._beats = self.board.beats()
        if first := self.board.first_failure():
            self._leave(first, None)
        self._asked = self._asked or self.board.stop_asked()
        if self._asked and self._beat.stage == _STARTING:  # a rank that has left already would be waited for
            self._leave(self._claim(Failure.of(stop.stopped_on(self._asked, self._where()), self.launch.rank)), None)
        if lost := self._pulse.look(self._beats, time.monotonic()):
            self._lose(lost)
        if self._beat.count % 4 == 0:
            self._say_running(self._beats.values())

    def _say_running(self, beats: Iterable[Beat]) -> None:
        if self.launch.rank == 0:
            ranks = [{name: getattr(beat, name) for name in _SHOWN} for beat in beats]
            status.write_status(self.folder, "running", self._started, ranks=ranks)

    def _listen(self) -> None:
        for number in stop.arrived(self._signals) if self._signals is not None else []:
            self._interrupts += number.name == "SIGINT"
            if self._interrupts > 1:
                self._leave(Failure.of(stop.stopped_on("SIGINT", self._where()), self.launch.rank), None)
            self._asked = self._asked or number.name
            self.board.ask_to_stop(number.name)
            logs.log(f"{number.name}: leaving at the next safe point", signal=number.name)

    def _lose(self, lost: Lost) -> NoReturn:
        """End the job because another rank is lost, and see to it that it is gone."""
        self._leave(self._claim(Failure.of(lost.error, lost.rank)), None)

    def _cause_elsewhere(self, error: BaseException) -> Failure | None:
        """Wait a moment for the reason why another rank did not answer; None when this rank's error is the cause.

        A rank of another host that went down with it says nothing: it is the one that fell silent meanwhile.
        """
        if not isinstance(Failure.of(error, 0).error(), DistributedError) or getattr(error, "shared", False):
            return None
        if kinds.is_about_to_abort(error):
            return None
        # The thread leaves as soon as it sees the cause, and this process with it.
        until = time.monotonic() + _CAUSE_S
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if first := self.board.first_failure():
                    return first
            time.sleep(_INTERVAL_S / 5)
        lost = self._pulse.unreachable(self._beats, _SILENCE_S)
        return self._claim(Failure.of(lost.error, lost.rank)) if lost else None

    def _claim(self, failure: Failure) -> Failure:
        try:
            return self.board.claim(failure)
        except RuntimeError:
            return failure

    def _located(self, failure: Failure) -> Failure:
        """Put rank and stage in front of where it happened, unless the error says it already."""
        if failure.where.startswith("rank"):
            return failure
        return replace(failure, where=": ".join(filter(None, [self._where(), failure.where])))

    def _where(self) -> str:
        beat = self._beat
        return f"rank {beat.rank}, {beat.stage}" + (f" {beat.done}/{beat.total}" if beat.total else "")

    def _leave(self, first: Failure, error: BaseException | None) -> NoReturn:
        """Write and say what has to be said, and end the process at once: an orderly exit waits for other ranks."""
        self._leaving.acquire()  # the other thread that wants to leave waits here for the end
        rank = self.launch.rank
        told = first.error()
        is_mine = self._speaks()
        logs.log(told.what, level=40, error=error, first_rank=first.rank, exit_code=int(first.exit_code))
        if isinstance(told, DistributedError):
            logs.dump_stacks(self.folder, rank)
            self._end_frozen(first)
        write_end(self.folder, self._started, first)
        write_error_file(first, is_first=is_mine)
        with suppress(Exception):
            self.console.close()
        if is_mine:
            if first.exit_code is ExitCode.BUG and error is not None:
                traceback.print_exception(error)
            print(told, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(first.exit_code)

    def _speaks(self) -> bool:
        """Tell whether this rank is the one that prints: the first to ask of those that are left."""
        try:
            return self.board.speaks()
        except RuntimeError:
            return True

    def _end_frozen(self, first: Failure) -> None:
        frozen = self._beats.get(first.rank)
        if first.rank != self.launch.rank and frozen is not None and first.what.endswith("hangs"):
            ask_for_stacks(frozen)
            time.sleep(_INTERVAL_S)
            kill_frozen(frozen)

    def _note(self) -> str:
        """Say what rank 0 knows of all ranks: the slowest, and the most memory that one uses."""
        if len(self._beats) < 2:
            return f"{_memory(self.launch.local_rank) / 2**30:.1f} GB"
        slowest = min(
            self._beats.values(), key=lambda beat: (beat.stage == self._beat.stage, beat.done, beat.step or 0)
        )
        most = max(beat.memory for beat in self._beats.values())
        return f"slowest rank {slowest.rank}, {most / 2**30:.1f} GB"


def _memory(local_rank: int) -> int:
    """Return the bytes of host memory, or of this rank's card if it uses more, that this process holds."""
    held = psutil.Process().memory_info().rss
    accelerator: Any = torch.accelerator
    if torch.accelerator.is_available() and hasattr(accelerator, "memory_allocated"):
        # By number: the current device is a thread's own, and the watching thread has never set one.
        with suppress(RuntimeError, ValueError):
            return max(held, accelerator.memory_allocated(local_rank % accelerator.device_count()))
    return held


def _store_lost(host: str, error: BaseException) -> DistributedError:
    return DistributedError(
        f"{host}, which keeps the ranks together, is gone or does not answer",
        why=" ".join(str(error).split())[:200],
        advice="read its output first; then run the same command again: finished parts are reused",
    )
