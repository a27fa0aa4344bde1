"""Which packages are installed, whether they fit each other, and the CANN beneath them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from launcher.devices.npu import check_pair
from launcher.doctor.finding import Finding, judged
from quant_core.errors import EnvironmentFailure

_OURS = "dit-quant-launcher"
_OPTIONAL = ("torch_npu", "peft", "mindiesd")
# Release of CANN -> the releases of torch_npu that go with it (README, "On an Ascend machine").
_PAIRS = {"8.5": ("2.6", "2.7", "2.8"), "9.1": ("2.9", "2.10", "2.11", "2.12")}
_TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/latest")


def packages() -> Iterator[Finding]:
    """Compare what is installed with what the product asks for."""
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}")
    try:
        required = [each for each in requires(_OURS) or () if "extra ==" not in each]
        yield Finding("ok", _OURS, version(_OURS))
    except PackageNotFoundError:
        required = []
        yield Finding(
            "--", _OURS, "a clone that is not installed: what it asks for is not looked at", "pip install -e ."
        )
    for requirement in map(Requirement, required):
        found = _version(requirement.name)
        yield judged(
            requirement.name,
            found or "not installed",
            f"pip install '{requirement}'",
            is_well=found is not None and requirement.specifier.contains(found, prereleases=True),
        )
    for name in _OPTIONAL:
        found = _version(name)
        yield Finding("ok" if found else "--", name, found or "not installed, and not always needed")


def pair() -> Iterator[Finding]:
    """Check that torch and torch_npu are of one release."""
    if _version("torch_npu") is None:
        return
    try:
        check_pair()
        yield Finding("ok", "torch and torch_npu", "of one release")
    except EnvironmentFailure as error:
        yield Finding("!!", "torch and torch_npu", error.what, error.advice or "")


def cann() -> Iterator[Finding]:
    """Find CANN, and check that torch_npu is one that goes with it."""
    installed = _version("torch_npu")
    release = cann_release(Path(os.environ.get("ASCEND_TOOLKIT_HOME", "")), *map(Path, _TOOLKITS))
    if release is None:
        fix = "source CANN's set_env.sh, or use --device cpu" if installed else ""
        yield Finding("!!" if installed else "--", "CANN", "not found", fix)
        return
    fitting = next((pairs for start, pairs in _PAIRS.items() if release.startswith(start)), None)
    if fitting is None or installed is None:
        yield Finding("--", "CANN", f"{release}; which torch_npu goes with it is not known here")
        return
    yield judged(
        "CANN",
        f"{release}, torch_npu {installed}",
        f"pip install '.[npu-{fitting[-1]}]': CANN {release} goes with torch_npu {' or '.join(fitting)}",
        is_well=installed.startswith(tuple(f"{each}." for each in fitting)),
    )


def cann_release(*toolkits: Path) -> str | None:
    """Return the release of the first toolkit that says one."""
    for toolkit in toolkits:
        files = [*toolkit.glob("*/ascend_toolkit_install.info"), *toolkit.glob("version.cfg")]
        for file in files if toolkit != Path() else []:
            text = file.read_text(encoding="utf-8", errors="replace")
            if found := re.search(r"version\w*\s*=\s*\[?[^\d\n]*([\w.]+)", text):
                return found[1]
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
