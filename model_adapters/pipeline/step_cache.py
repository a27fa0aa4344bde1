"""Approximate some denoising steps from earlier ones, to make images sooner.

Neighbouring steps resemble each other: when the first block's output has hardly changed since the last step that was
computed, the other blocks are skipped and that step's residual is added again (diffusers' first block cache). That is
for looking at images only. A calibration must never run so: skipped blocks see no input, and what the others see
comes from an approximated image. So the cache is a context around the making of images, and off everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# diffusers' own: the mean change of the first block's residual, relative to it, below which a step is skipped.
_THRESHOLD = 0.05


@contextmanager
def step_cache(pipeline: Any, threshold: float = _THRESHOLD) -> Iterator[None]:
    """Skip blocks of the pipeline's transformer in steps that change less than `threshold`, inside this context."""
    from diffusers import FirstBlockCacheConfig

    transformer = pipeline.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        yield
    finally:
        transformer.disable_cache()
