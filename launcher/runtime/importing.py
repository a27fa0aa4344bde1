"""Import MindIE-SD's quantization as it is installed, with or without an NPU.

What needs no compiled file is imported unchanged; the package `__init__` files that pull in attention kernels are left
out (spec: importing it). A process that does this should do nothing else: `torch.npu` and `torch_npu`, which it needs
(`npu_operators.install`), change what other libraries see.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

PACKAGE = "mindiesd"
# Packages whose __init__ imports what runs on an NPU only; modules below them are the real files.
_HOLLOW = (PACKAGE, f"{PACKAGE}.layers", f"{PACKAGE}.layers.flash_attn")


def installed() -> Path | None:
    """Return the folder that MindIE-SD would be imported from, or None where it is not installed; imports nothing."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).parent if places else None


def import_quantization(packages: Path) -> ModuleType:
    """Return the real `mindiesd.quantization` from the folder that holds the package.

    `torch_npu` has to be importable. Silences MindIE-SD's log, which would create files in the home folder.
    """
    os.environ["MINDIE_LOG_LEVEL"] = "null"
    for name in _HOLLOW:
        package = ModuleType(name)
        package.__path__ = [str(packages.joinpath(*name.split(".")))]
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, package)
        sys.modules[name] = package
    return import_module(f"{PACKAGE}.quantization")
