"""Large tensors of a job lie in large pages, where the system has any, and what the user says holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher.devices.host_memory import fits_in_memory, group_limits

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


def test_files_fit_that_leave_a_good_part_of_the_memory_to_others():
    available = psutil.virtual_memory().available
    assert fits_in_memory(available // 100)
    assert not fits_in_memory(available)


GROUPS = {
    "version 2": ("0::/job_7\n", {"job_7/memory.max": "2000\n"}, [2000]),
    "version 1": ("4:memory:/job_7\n1:cpu:/\n", {"memory/job_7/memory.limit_in_bytes": "3000\n"}, [3000]),
    "without a limit": ("0::/\n", {"memory.max": "max\n"}, []),
    "of another container": ("0::/elsewhere\n", {"memory.max": "2000\n"}, []),
}


@pytest.mark.parametrize(("groups", "files", "limits"), GROUPS.values(), ids=GROUPS)
def test_the_limit_of_a_control_group_is_found(tmp_path: Path, groups: str, files: dict[str, str], limits: list[int]):
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": c for n, c in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(group_limits(tmp_path)) == limits


def test_a_system_without_control_groups_sets_no_limit(tmp_path: Path):
    assert list(group_limits(tmp_path)) == []
