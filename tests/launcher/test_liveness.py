"""A rank is lost when its process is gone or its beat stands still, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launcher.devices.launch import Launch
from launcher.failure.liveness import Liveness, here, is_gone
from launcher.failure.shared_state import Heartbeat

HANG_S, START_S = 10.0, 100.0
ELSEWHERE = Heartbeat(rank=1, count=1, pid=1, started=0.0, host="another-host", stage="quantize", done=3, total=9)


def liveness() -> Liveness:
    return Liveness(Launch(0, 2), hang_limit_s=HANG_S, start_limit_s=START_S, now=0.0)


def look_each_second(watching: Liveness, heartbeats: list[Heartbeat | None]) -> list[str | None]:
    """Return what is said at each second, one beat of rank 1 a second."""
    said = []
    for second, beat in enumerate(heartbeats, start=1):
        lost = watching.look({1: beat} if beat else {}, float(second))
        said.append(lost.what if lost else None)
    return said


def test_a_rank_that_beats_is_well_however_long_its_work_takes() -> None:
    assert set(look_each_second(liveness(), [replace(ELSEWHERE, count=n) for n in range(50)])) == {None}


def test_a_beat_that_stands_still_for_the_limit_is_a_hang_and_names_the_rank_and_its_stage() -> None:
    said = look_each_second(liveness(), [ELSEWHERE] * 12)
    assert said[:11] == [None] * 11  # first seen at 1 s, so 10 s of silence have not passed before second 12
    assert said[11] == "rank 1 hangs"
    watching = liveness()
    look_each_second(watching, [ELSEWHERE] * 11)
    lost = watching.look({1: ELSEWHERE}, 12.0)
    assert lost is not None
    assert lost.place == "rank 1, quantize 3/9: process 1 on another-host"
    assert lost.is_frozen


def test_a_rank_that_finished_may_be_silent_and_gone() -> None:
    assert set(look_each_second(liveness(), [replace(ELSEWHERE, finished=True)] * 50)) == {None}


def test_a_rank_that_never_comes_has_the_longer_limit_of_starting() -> None:
    said = look_each_second(liveness(), [None] * 102)
    assert said[:100] == [None] * 100
    assert said[101] == "rank 1 never came"


def test_whoever_was_stopped_itself_does_not_blame_the_others() -> None:
    watching = liveness()
    assert watching.look({1: ELSEWHERE}, 1.0) is None
    assert watching.look({1: ELSEWHERE}, 1000.0) is None  # this process slept, so the silence proves nothing
    assert watching.look({1: ELSEWHERE}, 1004.0) is None


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_that_was_killed_is_gone_at_once_on_its_own_host(child: subprocess.Popen[bytes]) -> None:
    beat = Heartbeat(1, 1, child.pid, psutil.Process(child.pid).create_time(), here())
    assert not is_gone(beat)
    child.kill()
    child.wait()
    assert is_gone(beat)
    lost = liveness().look({1: beat}, 1.0)
    assert lost is not None
    assert lost.what == "rank 1 vanished"


def test_another_process_with_the_number_of_the_rank_is_not_the_rank() -> None:
    started = psutil.Process().create_time() - 3600  # the rank began an hour before this process got its number
    assert is_gone(Heartbeat(1, 1, os.getpid(), started, here()))


@pytest.mark.parametrize(("trouble", "gone"), [(psutil.AccessDenied, False), (psutil.NoSuchProcess, True)])
def test_a_process_that_cannot_be_looked_at_is_there_and_one_that_ends_meanwhile_is_gone(
    trouble: type[psutil.Error], gone: bool, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(1, 1, child.pid, psutil.Process(child.pid).create_time(), here())

    def status(process: psutil.Process) -> str:
        raise trouble(process.pid)  # pyright: ignore[reportCallIssue]

    monkeypatch.setattr(psutil.Process, "status", status)
    assert is_gone(heartbeat) is gone
    child.kill()


def test_a_host_with_the_same_name_is_another_one() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert not is_gone(replace(ELSEWHERE, pid=2**22, host=here().replace(boot, "another start of a kernel")))


def test_nothing_is_said_about_processes_of_other_hosts() -> None:
    assert not is_gone(replace(ELSEWHERE, pid=2**22))


@pytest.mark.parametrize(
    ("beat", "seconds", "told"),
    [(ELSEWHERE, 4, "rank 1 cannot be reached any more"), (ELSEWHERE, 2, None),
     (replace(ELSEWHERE, finished=True), 4, None)],
)  # fmt: skip
def test_whoever_lost_a_connection_learns_which_rank_fell_silent(
    beat: Heartbeat, seconds: int, told: str | None
) -> None:
    watching = liveness()
    look_each_second(watching, [beat] * seconds)
    lost = watching.unreachable({0: replace(ELSEWHERE, rank=0), 1: beat}, 2.0)
    assert (lost and lost.what) == told
