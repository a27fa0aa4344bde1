"""Let a scheduler that draws noise in its steps draw it from the request, not from the process.

Some schedulers of diffusers draw in every step, and pipelines of flow models hand them no generator. Then each process
draws from its own, and the ranks of one copy of the model go apart from the first step on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def drawing_from(generators: Any, scheduler: Any) -> Iterator[None]:
    """Give `generators` to every step of a scheduler that takes any, inside the block.

    generators: one for each prompt, or one for all.
    """
    before = dict(vars(scheduler))  # somebody may look at the steps already
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.step = partial(scheduler.step, generator=generators)
    try:
        yield
    finally:
        vars(scheduler).pop("step", None)
        if "step" in before:
            scheduler.step = before["step"]
