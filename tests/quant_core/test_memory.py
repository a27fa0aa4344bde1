"""Memory does not grow with the number of calibration records: statistics are kept, activations are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Quantizes the golden FLUX with records of 400 image tokens, of each count in turn, and prints the peak resident memory
# in MiB after each. One record's inputs of all linears are about 13 MiB in float32, so whoever keeps those of 64
# records needs 0.8 GiB more.
PROGRAM = """
import sys
import torch
sys.path.insert(0, "tests/quant_core")
from tests.support.golden_cases import GoldenCase
from scripts.bench.usage import resident
from quant_core import *
from quant_core.calibration.records import Record

kind, *counts = sys.argv[1:]
case = GoldenCase("flux_w8a8_dynamic_m4_fp32")
grid = torch.cartesian_prod(torch.zeros(1), torch.arange(20.0), torch.arange(20.0))
generator = torch.Generator().manual_seed(0)
first = case.records[0]

def record(step):
    args = [torch.randn(1, 400, 16, generator=generator), *first[1:4], grid, *first[5:]]
    return Record(args, {}, step % 2)

schemes = {
    "static": {"w8a8": W8A8ProcessorConfig()},
    "m6": {"w8a8_dynamic": W8A8DynamicProcessorConfig(), "m6": M6ProcessorConfig(cfg=M6Config(alpha=0.5))},
}
torch.set_num_threads(1)
for count in map(int, counts):
    records = [record(i) for i in range(count)]
    quant_model(case.model(), SessionConfig(processor_cfg_map=schemes[kind], calib_data=records))
    print(resident(mark="peak") / 2**20)
"""


def peaks_mib(kind: str, *records: int) -> list[float]:
    """Return the peaks of a fresh process, so far, after a session with each number of records."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, kind, *map(str, records)]
    done = subprocess.run(words, cwd=ROOT, env=environ, check=True, capture_output=True, text=True)
    return list(map(float, done.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "m6"])
def test_peak_memory_is_the_same_for_4_and_for_64_records(kind):
    few, many = peaks_mib(kind, 4, 64)
    # The records themselves are 25 KiB each; 8 % is what the allocator's luck amounts to.
    assert many < 1.08 * few, f"{kind}: {few:.0f} MiB with 4 records, {many:.0f} MiB with 64"
