"""Have the runtime itself load the files, and compare what its layers compute with what the quantizer said they would.

The runtime's import changes torch for the whole process, so a process of its own does it (`launcher.runtime.worker`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launcher.inspection.published import Published, RankCheckpoint
from launcher.runtime.importing import PACKAGE, installed
from quant_core.checkpoint.findings import Finding
from quant_core.errors import EnvironmentFailure

# Minutes for a model of 12 billion parameters; nobody waits for ever.
_TIMEOUT_S = 7200


def load_with_runtime(published: Published) -> tuple[list[Finding], str]:
    """Return what the runtime makes otherwise of the files, and a line that says what was run.

    Raises EnvironmentFailure where MindIE-SD is not installed or cannot be imported.
    """
    packages = installed()
    if packages is None:
        raise EnvironmentFailure(
            "MindIE-SD is not installed here",
            where=f"package {PACKAGE}, python {sys.executable}",
            why="--runtime loads the files with the runtime itself",
            advice="pip install --no-deps mindiesd==3.1.0 (an NPU is not needed), or leave out --runtime",
        )
    suffixes = ["" if rank.tp_rank is None else f"_{rank.tp_rank}" for rank in published.ranks]
    told = _run(str(packages), str(published.folder), published.scheme, *suffixes)
    findings = [each for rank, found in zip(published.ranks, told) for each in _findings(rank, found)]
    differences = [excess for found in told for excess in found["excess"].values()]
    line = f"MindIE-SD {_version()} loaded the files and computed with {len(differences)} layers, on the CPU with a "
    line += f"stand-in for the NPU's operators; largest difference {max(differences, default=0.0):.2f} of what rounding"
    return findings, f"{line} may make"


def _run(*words: str) -> list[dict[str, Any]]:
    path = os.pathsep.join(filter(None, sys.path))
    # A real torch_npu stays out of that process.
    environ = {**os.environ, "PYTHONPATH": path, "RANK": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.runtime.worker", *words],
            env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _unusable(f"it took more than {_TIMEOUT_S / 60:.0f} minutes", "leave out --runtime") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise _unusable(last, "see that Python is 3.11 or newer and that import torch works; or leave out --runtime")
    return json.loads(done.stdout.splitlines()[-1])


def _unusable(why: str, advice: str) -> EnvironmentFailure:
    where = f"package {PACKAGE} {_version()}"
    return EnvironmentFailure("MindIE-SD cannot be used here", where=where, why=why, advice=advice)


def _version() -> str:
    try:
        return version(PACKAGE) or "(unknown)"
    except PackageNotFoundError:
        return "(unknown)"


def _findings(rank: RankCheckpoint, found: dict[str, Any]) -> Iterator[Finding]:
    file = rank.files.weights
    if found["error"]:
        yield Finding("the runtime loads", file, "", found["error"], "its own words")
        return
    described = set(rank.inventory.layers)
    for name in sorted(described ^ set(found["replaced"])):
        what = f"'{name}' is {'not ' if name in described else ''}replaced by the runtime"
        yield Finding(
            "the runtime replaces", file, name, what, "it replaces the layers that are quantized, and no others"
        )
    for name, error in found["failed"].items():
        yield Finding("the runtime computes", file, name, f"'{name}' cannot compute: {error}", "its own words")
    for name, excess in found["excess"].items():
        if not excess <= 1:
            what = f"'{name}' computes something else: {excess:.1f} times what rounding may make"
            yield Finding("the runtime computes", file, name, what, "both multiply the same codes and scales")
