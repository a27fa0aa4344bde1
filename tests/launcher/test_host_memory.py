"""Large tensors of a job lie in large pages, where the system has any, and what the user says holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Starts as a rank does, with a command that imports no torch, and counts the faults of filling 64 MB.
PROGRAM = """
import resource, sys
from contextlib import suppress
from launcher.__main__ import main
with suppress(SystemExit):
    main(["--help"])
assert "torch" not in sys.modules
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
torch.empty(2**26, dtype=torch.uint8).fill_(1)
print(faults() - before)
"""


def faults(**variables: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(
    not _SYSTEM.exists() or "[madvise]" not in _SYSTEM.read_text(), reason="the system gives no large pages on request"
)
def test_large_tensors_lie_in_large_pages_unless_the_user_says_otherwise():
    small = faults(THP_MEM_ALLOC_ENABLE="0")
    assert small > 2**26 / 2**12 / 2
    assert faults() < small / 4
