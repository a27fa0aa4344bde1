"""Every golden case is equal to the last bit with the kernels the reference tool ran with.

Other tests ask of any processor what holds on any processor; this one takes the kernels of the reference as well.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.golden_cases import GOLDEN, GoldenCase, Written, differing
from tests.support.reference_kernels import UNAVAILABLE
from tests.support.torchrun import ROOT

CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what we write with those kernels, a folder a case."""
    folder = tmp_path_factory.mktemp("golden")
    program = [sys.executable, "-m", "tests.support.reference_kernels", str(folder), *CASES]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=ROOT)
    if done.returncode == UNAVAILABLE:
        pytest.skip(f"the reference tool's kernels: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_and_the_description_are_bit_equal(name: str, written: Path):
    case = GoldenCase(name)
    ours = Written.read(written / name, case.scheme)
    assert differing(ours.tensors, case.golden.tensors) == []
    assert ours.description == case.golden.description


@pytest.mark.parametrize("name", CASES)
def test_one_bit_in_any_tensor_is_found(name: str, written: Path):
    case = GoldenCase(name)
    golden = case.golden.tensors
    for tensor in golden.values():
        tensor.view(-1).view(INTEGERS[tensor.element_size()])[0] ^= 1
    ours = Written.read(written / name, case.scheme)
    assert differing(ours.tensors, golden) == sorted(golden)
