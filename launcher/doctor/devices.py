"""Which devices of each kind a process of this user can see."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from launcher.devices.kinds import KINDS, DeviceKind
from launcher.doctor.finding import Finding
from quant_core.errors import EnvironmentFailure


def devices() -> Iterator[Finding]:
    """Describe the devices of every kind, the cards with their free memory."""
    from launcher.devices.choice import available_cores

    yield Finding("ok", "cpu", f"{available_cores()} cores")
    for kind in KINDS.values():
        if kind.has_cards:
            yield _cards(kind)


def first_with_cards() -> str:
    """Return the kind of device that a job on this machine would want: the first with cards, else the processor."""
    return next((kind.name for kind in KINDS.values() if kind.has_cards and _cards(kind).mark == "ok"), "cpu")


def _cards(kind: DeviceKind) -> Finding:
    from launcher.devices.choice import find_cards

    try:
        cards = find_cards(kind.name, os.environ)
    except EnvironmentFailure as error:
        is_absent = error.what.endswith("is not installed")
        said = error.what if is_absent else f"{error.what}: {error.why}"
        return Finding("--" if is_absent else "!!", kind.name, said, "" if is_absent else error.advice or "")
    if not cards.count:
        return Finding("--", kind.name, f"none visible ({cards.visible})", f"{kind.listing} lists those of the host")
    return Finding("ok", kind.name, "; ".join(_card(kind.name, index) for index in range(cards.count)))


def _card(kind: str, index: int) -> str:
    module: Any = getattr(importlib.import_module("torch"), kind)
    free, total = module.mem_get_info(index)
    return f"{module.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
