"""Monitor one rank's run: show that it lives, notice signals and lost ranks, and end it with the first failure's words.

A thread does it, because the main thread may be inside a collective for minutes. Twice a second it

    publishes this rank's heartbeat            reads the signals that arrived and passes the request to all ranks
    reads the first failure, and leaves        looks whether another rank vanished or hangs

Two ways lead out of a run. At a *safe point* (a batch saved, a record replayed) the ranks agree to stop and all leave
in order. On a *failure* nobody waits: the first rank that posts it in the shared state speaks, and every other leaves
with its words and its exit status, wherever it is. Killing a rank anywhere is safe, because no file appears under its
final name before it is whole.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist

from launcher.config.job_config import JobConfig
from launcher.devices.kinds import is_about_to_abort
from launcher.devices.launch import Launch, read_launch
from launcher.devices.memory_use import held_memory
from launcher.failure.liveness import Liveness, end_frozen, here
from launcher.failure.record import STARTING, Failure, carried_by, write_end
from launcher.failure.shared_state import Heartbeat, SharedState, StateLost
from launcher.failure.signals import arrived, on_signals, stopped_on
from launcher.failure.way_out import leave
from launcher.journal import logs
from launcher.journal.console import Console
from launcher.journal.stages import StageClock
from launcher.journal.status import account_folder, is_kept, write_status
from launcher.ranks.rendezvous import meet

_INTERVAL_S = 0.5
# So many looks in a row that fail are no accident; fewer are survived.
_FAILED_LOOKS = 3
# How long the cause of a lost connection may take to show: a look of the monitors, and the kernel's clean-up.
_CAUSE_S = 3.0
# Within that time, how long a silence is no accident.
_SILENCE_S = 2.0
# How long the account of the end waits for a status that is being written; a disk that hangs must not keep it.
_WRITING_S = 2.0
# What `status.json` says of each rank.
_SHOWN = ("rank", "stage", "done", "total", "step", "memory", "host", "pid")


class Monitor:
    """Know where this rank is, tell the others, and end the process when the job cannot go on."""

    def __init__(self, config: JobConfig, launch: Launch | None = None) -> None:
        self.launch = launch or read_launch(os.environ)
        self.rendezvous = meet(self.launch, config.ranks.timeout_s)
        self.console = Console(speaks=self.launch.rank == 0, note=self._note)
        self._state = SharedState(self.rendezvous, self.launch)
        self._run_name = self._state.run()
        self._folder = account_folder(config)
        self._started = time.time()
        process = psutil.Process()
        self._heartbeat = Heartbeat(self.launch.rank, 0, process.pid, process.create_time(), here(), STARTING)
        self._heartbeats: dict[int, Heartbeat] = {}
        self._clock = StageClock(self.launch.rank)
        limits = float(config.ranks.hang_timeout), float(config.ranks.timeout_s)
        self._liveness = Liveness(self.launch, *limits, now=time.monotonic())
        self._count = 0
        self._asked: str | None = None
        self._interrupts = 0
        # Whoever writes the status holds the one, and says that the job runs until the account of its end begins.
        self._status = threading.Lock()
        self._is_ending = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin to watch, and to take signals as requests; call it in the main thread."""
        with suppress(OSError):  # a folder that cannot be made is the output's error, told where it is needed
            logs.open_log(self._folder, self.launch.rank, self._run_name)
        on_signals(lambda number: None)  # the thread reads them
        self._say_running([self._heartbeat])
        self._thread.start()

    def enter(self, stage: str) -> None:
        """Note which stage this rank is in."""
        self._heartbeat = replace(self._heartbeat, stage=stage, done=0, total=0, step=None)
        if line := self._clock.turn(stage, held_memory()):
            self.console.say(line)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Note and show how far this rank is in a stage."""
        self._heartbeat = replace(self._heartbeat, stage=stage, done=done, total=total, step=None)
        self.console.progress(stage, done, total)

    def step(self, stage: str, step: int, steps: int) -> None:
        """Note and show the denoising step inside the unit of work that `progress` counts."""
        self._heartbeat = replace(self._heartbeat, stage=stage, step=step)
        self.console.progress(stage, self._heartbeat.done, self._heartbeat.total, part=step / steps)

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
            raise stopped_on(self._asked or self._state.stop_asked() or "SIGTERM")

    def finish(self) -> None:
        """Stop watching after success; rank 0 says that the job is done."""
        if line := self._clock.turn("", held_memory()):
            self.console.say(line)
        self._heartbeat = replace(self._heartbeat, finished=True, stage="finished")
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._state.publish(self._heartbeat)
        self.console.close()
        if self.launch.rank == 0:
            self._say_end(None)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an exception in its main thread, or because of what caused that."""
        mine = self._failure(error)
        is_consequence = mine.is_about_others and carried_by(error) is None and not is_about_to_abort(error)
        cause = self._cause_elsewhere() if is_consequence else None
        self._leave(self._state.claim(cause or mine), error)

    def _run(self) -> None:
        """Look until the job is over; a thread that died of an error would have this rank, which is well, killed."""
        failed = 0
        while not self._over.wait(_INTERVAL_S):
            try:
                self._tick()
                failed = 0
            except StateLost as error:
                self._leave(self._failure(error), error)
            except Exception as error:
                failed += 1
                logs.log("the monitor could not look", level=40, error=error)
                if failed == _FAILED_LOOKS:
                    self._leave(self._state.claim(self._failure(error)), error)

    def _tick(self) -> None:
        self._listen()
        self._count += 1
        # Not kept: the main thread may have changed stage and progress meanwhile.
        own = replace(self._heartbeat, count=self._count, memory=held_memory())
        self._state.publish(own)
        self._heartbeats = self._state.heartbeats()
        for heartbeat in (*self._heartbeats.values(), own):
            self._clock.see(heartbeat.rank, heartbeat.memory)
        if first := self._state.first_failure():
            self._leave(first)
        self._asked = self._asked or self._state.stop_asked()
        if self._asked and self._heartbeat.stage == STARTING:  # a rank that has left already would be waited for
            self._leave(self._state.claim(self._failure(stopped_on(self._asked))))
        if lost := self._liveness.look(self._heartbeats, time.monotonic()):
            self._leave(self._state.claim(lost))
        if self._count % 4 == 0:
            self._say_running(self._heartbeats.values())

    def _listen(self) -> None:
        for number in arrived():
            self._interrupts += number.name == "SIGINT"
            if self._interrupts > 1:
                self._leave(self._failure(stopped_on(number.name)))
            self._asked = self._asked or number.name
            self._state.ask_to_stop(number.name)
            logs.log(f"{number.name}: leaving at the next safe point", signal=number.name)

    def _say_running(self, heartbeats: Iterable[Heartbeat]) -> None:
        if self.launch.rank != 0 or is_kept(self._folder, self._run_name):
            return
        ranks = [{name: getattr(heartbeat, name) for name in _SHOWN} for heartbeat in heartbeats]
        with self._status:
            if not self._is_ending:
                write_status(self._folder, "running", self._started, run=self._run_name, ranks=ranks)

    def _say_end(self, first: Failure | None) -> None:
        self._is_ending = True
        is_free = self._status.acquire(timeout=_WRITING_S)
        try:
            write_end(self._folder, self._started, first)
        finally:
            if is_free:
                self._status.release()

    def _failure(self, error: BaseException) -> Failure:
        return Failure.of(error, self.launch.rank, self._heartbeat.work)

    def _cause_elsewhere(self) -> Failure | None:
        """Wait a moment for the reason why another rank did not answer; None when this rank's error is the cause.

        A rank of another host that went down with it says nothing: it is the one that fell silent meanwhile.
        """
        # The thread leaves as soon as it sees the cause, and this process with it.
        until = time.monotonic() + _CAUSE_S
        while time.monotonic() < until:
            with suppress(StateLost):
                if first := self._state.first_failure():
                    return first
            time.sleep(_INTERVAL_S / 5)
        return self._liveness.unreachable(self._heartbeats, _SILENCE_S)

    def _leave(self, first: Failure, error: BaseException | None = None) -> NoReturn:
        leave(first, speaks=self._state.speaks, account=lambda: self._account(first, error))

    def _account(self, first: Failure, error: BaseException | None) -> None:
        logs.log(first.what, level=40, error=error, first_rank=first.rank, exit_code=int(first.exit_code))
        if first.is_about_others:
            logs.dump_stacks(self._folder, self.launch.rank)
        if first.is_frozen and first.rank != self.launch.rank and first.rank in self._heartbeats:
            end_frozen(self._heartbeats[first.rank])
        self._say_end(first)
        self.console.close()

    def _note(self) -> str:
        """Say what rank 0 knows of all ranks: the slowest, and the most memory that one uses."""
        if len(self._heartbeats) < 2:
            return f"{held_memory() / 2**30:.1f} GiB"
        stage, heartbeats = self._heartbeat.stage, self._heartbeats.values()
        slowest = min(heartbeats, key=lambda each: (each.stage == stage, each.done, each.step or 0))
        most = max(each.memory for each in heartbeats)
        return f"slowest rank {slowest.rank}, {most / 2**30:.1f} GiB"
