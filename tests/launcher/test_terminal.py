"""What a command prints arrives whole, however slowly it is read; a job waits for no reader."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from contextlib import closing

from tests.support.torchrun import ROOT

LINES = 2000
PRINTS = f"""
from launcher.failure.way_out import finish
from launcher.journal.terminal import survive_its_loss, wait_for_no_reader
survive_its_loss()
{{job}}
for number in range({LINES}):
    print("line", number)
finish()
"""
JOB = "wait_for_no_reader()"
# Longer than a job waits for a reader.
SLOW_S = 3.0


def small_pipe() -> tuple[int, int]:
    """Return a pipe with room for a page: its ends to read and to write."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def read_after(seconds: float, *words: str) -> tuple[int, str]:
    """Run Python, begin to read what it prints after a while, and return its status and all that came."""
    reader, writer = small_pipe()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, *words], stdout=writer, env=environ) as program:
        os.close(writer)
        time.sleep(seconds)
        with open(reader) as read:
            text = read.read()
    return program.returncode, text


def test_a_slow_reader_gets_all_that_a_command_prints() -> None:
    status, text = read_after(SLOW_S, "-c", PRINTS.format(job=""))
    assert status == 0
    assert text.splitlines() == [f"line {number}" for number in range(LINES)]


def test_a_burst_of_lines_of_a_job_reaches_a_reader_that_reads() -> None:
    _, text = read_after(0, "-c", PRINTS.format(job=JOB))
    assert text.splitlines() == [f"line {number}" for number in range(LINES)]


def test_a_job_ends_although_nobody_reads() -> None:
    reader, writer = small_pipe()
    with (
        closing(os.fdopen(reader)),
        subprocess.Popen([sys.executable, "-c", PRINTS.format(job=JOB)], stdout=writer) as job,
    ):
        assert job.wait(timeout=60) == 0
