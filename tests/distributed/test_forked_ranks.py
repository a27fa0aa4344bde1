"""Forked ranks find what torchrun's find, end as they do, and leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests.support.forked_ranks import run_forked
from tests.support.torchrun import run_torchrun

pytestmark = pytest.mark.distributed

# A rank that says what it sees, and where it is.
SAYS = """
import json, os, sys
seen = {name: value for name, value in os.environ.items() if "PORT" not in name}
open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w").write(json.dumps([seen, sys.argv, sys.path[0], os.getcwd()]))
sys.stdout.write(f"rank {os.environ['RANK']}\\n")  # in one call: the ranks share the pipe
"""
# A rank that fails while the other waits for it.
FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    sys.exit(4)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("was asked"))
open(sys.argv[1], "w").close()
time.sleep(600)
"""
# Ranks that wait with a process of their own, deaf to being asked.
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "601"])
sys.stdout.write("waits\\n")
sys.stdout.flush()
time.sleep(600)
"""
# What torchrun says of itself and of its host.
OWN = {
    "MASTER_ADDR",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_SIGNALS_TO_HANDLE",
}


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_a_forked_rank_sees_what_a_rank_of_torchrun_sees(tmp_path: Path):
    words, found = (script(tmp_path, SAYS), tmp_path), []
    for run in (run_torchrun, run_forked):
        done = run(2, *words, environ={"OWN_VARIABLE": "1"})
        assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["rank 0", "rank 1"]), done.stderr
        found.append([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)])
    for (theirs, *their_place), (ours, *our_place) in zip(*found):
        assert our_place == their_place
        differing = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
        assert differing - OWN == set(), differing


def test_the_first_failure_is_the_status_and_ends_the_other_rank(tmp_path: Path):
    done = run_forked(2, script(tmp_path, FAILS), tmp_path / "ready")
    assert (done.returncode, done.stderr) == (4, "was asked\n")


def test_ranks_whose_time_is_up_are_ended_with_what_they_started(tmp_path: Path):
    done = run_forked(2, script(tmp_path, HANGS), timeout_s=4)
    assert done.returncode is None
    assert done.stdout == "waits\nwaits\n"
    started = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "601"]]
    _, alive = psutil.wait_procs(started, timeout=5)  # what was killed is gone in a moment, not at once
    assert not alive
