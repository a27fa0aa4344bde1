"""How much memory this process holds, on the host or on its card."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil
import torch


def held_memory() -> int:
    """Return the bytes of host memory, or of its card if it uses more, that this process holds."""
    held = psutil.Process().memory_info().rss
    accelerator: Any = torch.accelerator
    if torch.accelerator.is_available() and hasattr(accelerator, "memory_allocated"):
        # Of every card that it sees, of which it uses one: the current device is a thread's own, and the watching
        # thread has never set one.
        with suppress(RuntimeError, ValueError):
            return max([held, *map(accelerator.memory_allocated, range(accelerator.device_count()))])
    return held
