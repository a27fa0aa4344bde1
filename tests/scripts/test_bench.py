"""The benchmark measures what happens, and its smallest row runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench.cost import CommandFailed, Cost, python, run
from scripts.bench.from_disk import places
from scripts.bench.rows import PIPELINES, ROWS
from scripts.bench.table import COLUMNS, Measured, lines

ROOT = Path(__file__).parents[2]
MB = 10**6

# A process that hands its work to a child: 0.3 s of arithmetic, 40 MB in memory, 20 MB written and read.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]], check=True)"
CHILD = """
import sys, time
held = b"1" * 40_000_000
with open(sys.argv[1], "wb") as file: file.write(b"0" * 20_000_000)
with open(sys.argv[1], "rb") as file: file.read()
while time.process_time() < 0.3: pass
time.sleep(0.5)
"""


def test_the_smallest_row_becomes_a_line_of_the_table(tmp_path):
    words = [sys.executable, "scripts/bench", "--smoke", "--repeat", "1", "--markdown", "--folder", str(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heading, rule, row = done.stdout.strip().splitlines()
    assert heading.split("|")[1].strip() == "job"
    assert heading.count("|") == rule.count("|") == row.count("|") == len(COLUMNS) + 1
    assert row.startswith("| 6 M in memory, dynamic | ")
    assert list(tmp_path.iterdir()) == []  # outputs go, and this row needs no pipeline


def test_what_a_child_of_the_command_used_is_counted(tmp_path):
    cost = run(python("-c", PARENT, CHILD, str(tmp_path / "file")), {})
    assert cost.cpu_s >= 0.3
    assert cost.wall_s >= 0.8
    assert cost.peak_bytes > 40 * MB
    assert cost.called_bytes >= 20 * MB
    assert cost.written_bytes >= 20 * MB


def test_the_peak_of_a_program_is_its_own_and_not_that_of_who_started_it():
    large = "import subprocess, sys; held = b'1' * 300_000_000; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    own = "from scripts.bench.usage import resident; print(resident(mark='peak'))"
    done = subprocess.run([sys.executable, "-c", large, own], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 100 * MB


def test_a_command_that_fails_is_no_cost():
    with pytest.raises(CommandFailed, match=r"(?s)ended with 3.*no such model"):
        run(python("-c", "print('no such model'); raise SystemExit(3)"), {})


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_all_runs():
    # A machine that becomes three times slower between the repeats: the pairs still say 2.
    pairs = [(_cost(2.0), _cost(1.0)), (_cost(6.0), _cost(3.0)), (_cost(5.0), _cost(1.0))]
    assert Measured("row", pairs).ratio(lambda cost: cost.cpu_s) == "2.00 (2.00 to 5.00)"
    assert lines([Measured("row", pairs)], markdown=False)[1].split()[:4] == ["row", "5.0", "/", "1.0"]


def test_every_row_names_a_pipeline_that_can_be_made_and_a_floor():
    assert {row.pipeline for row in ROWS if row.pipeline} == set(PIPELINES)
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert any("scripts.bench" in word for word in row.floor)
        assert ("{folder}" in row.ours) == (row.pipeline is not None)


def test_the_floor_finds_every_tensor_where_it_lies(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"a.weight": torch.randn(3, 5).bfloat16(), "b": torch.arange(4.0), "c.weight": torch.randn(2, 2).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = places(tmp_path)
    assert [place.start for place in found] == sorted(place.start for place in found)
    for place in found:
        raw = bytearray(place.path.read_bytes()[place.start : place.stop])
        read = torch.frombuffer(raw, dtype=place.dtype).view(place.shape)
        assert torch.equal(read, load_file(place.path)[place.name])
    assert {place.name for place in found} == set(tensors)


def _cost(cpu_s: float) -> Cost:
    return Cost(cpu_s=cpu_s, wall_s=1.0, peak_bytes=1, read_bytes=0, called_bytes=0, written_bytes=0)
