"""Learn from a pipeline's scheduler which denoising step the transformer is being called for.

A scheduler counts its own steps: `step_index` is None until the first `step()` of a run, because only then the
scheduler looks where to begin, and grows by one at the end of each `step()`. The transformer is called *before*
`step()`, so during the transformer's forward the count is that of the current step. Guidance that calls the
transformer twice (or on a doubled batch) still calls `step()` once, so both calls belong to one step.

Worked example, 3 steps, true guidance (two calls a step): calls 1 2 3 4 5 6 read None None 1 1 2 2, which are the
steps 0 0 1 1 2 2. `set_timesteps` resets the count, so the next image begins at 0 again.
"""

from __future__ import annotations

from typing import Any


def step_index(pipeline: Any) -> int:
    """Return the index of the denoising step that the current call of the transformer belongs to, from 0."""
    scheduler = pipeline.scheduler
    if scheduler.step_index is not None:
        return int(scheduler.step_index)
    # Before the first step: an image-to-image run begins at a later step and tells the scheduler so.
    return int(scheduler.begin_index or 0)
