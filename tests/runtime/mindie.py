"""The real consumer: fetch the Python files of MindIE-SD's wheel once.

The wheel is 67 MB, of which 1 MB are Python; the rest is compiled for Ascend and is not unpacked. None of it belongs
into a repository: `fetch` puts it into a cache, which `launcher.runtime.importing` imports it from.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

VERSION = "3.1.0"
# A wheel that exists, whatever interpreter and platform ask for it: only its Python files are used.
_CHOICE = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_34_x86_64")
# One quick try: who has no network shall learn it in seconds.
_PATIENCE = ("--retries=1", "--timeout=15")
_DOWNLOAD_TIMEOUT_S = 300


class Unavailable(Exception):
    """MindIE-SD cannot be had on this machine; the text says why in a line."""


def fetch(cache: Path) -> Path:
    """Return the folder to import MindIE-SD from, filled at the first call; several processes may call this at once.

    Raises Unavailable when this Python is too old for it, or the wheel can be downloaded from nowhere.
    """
    if sys.version_info < (3, 11) and find_spec("strenum") is None:
        raise Unavailable("MindIE-SD needs Python 3.11, or 3.10 with the package strenum")
    packages = cache / f"mindiesd-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if not packages.exists():
            _fill(packages)
    return packages


def _fill(packages: Path) -> None:
    """Download and unpack beside the final name, which appears when everything is there."""
    with tempfile.TemporaryDirectory(dir=packages.parent) as temporary:
        wheel, unpacked = _download(Path(temporary)), Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", "LICENSE.md"))]
            archive.extractall(unpacked, names)
        unpacked.rename(packages)


def _download(folder: Path) -> Path:
    # The pip outside of all environments, because an environment need not have one.
    pip = [getattr(sys, "_base_executable", sys.executable), "-m", "pip", "download", "--quiet", "--no-deps"]
    words = [*pip, "--disable-pip-version-check", *_PATIENCE, *_CHOICE, "--dest", str(folder), f"mindiesd=={VERSION}"]
    problem = f"the wheel of MindIE-SD {VERSION} cannot be downloaded"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{problem}: no end after {_DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(f"{problem}: {' / '.join(said[-2:])}")
    return next(folder.glob("*.whl"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
