"""Look at the latents after each denoising step, without touching the pipeline.

Every pipeline hands the transformer's output to its scheduler once a step and goes on with what that returns, so the
scheduler is where latents pass by; a callback of the pipeline would have to exist in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor


@contextmanager
def watched_latents(
    pipeline: Any, step_index: Callable[[Any], int], see: Callable[[int, Tensor], object]
) -> Iterator[None]:
    """Call `see` with the step's index and the latents (batch, ...) after each step, inside the block."""
    scheduler = pipeline.scheduler
    own = scheduler.step

    # Pipelines look at the signature of `step` to learn what it takes.
    @wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        index = step_index(pipeline)
        result = own(*args, **kwargs)
        see(index, result[0])
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
