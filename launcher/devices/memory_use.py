"""How much memory this process holds, on the host or on its card."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil
import torch


def held_memory(local_rank: int) -> int:
    """Return the bytes of host memory, or of this rank's card if it uses more, that this process holds."""
    held = psutil.Process().memory_info().rss
    accelerator: Any = torch.accelerator
    if torch.accelerator.is_available() and hasattr(accelerator, "memory_allocated"):
        # By number: the current device is a thread's own, and the watching thread has never set one.
        with suppress(RuntimeError, ValueError):
            return max(held, accelerator.memory_allocated(local_rank % accelerator.device_count()))
    return held
