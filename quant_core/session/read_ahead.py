"""Read tensors in a thread of its own, one step ahead of whoever works on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

# full name of a tensor -> this rank's part of it, on the host
ReadTensor = Callable[[str], Tensor]


@contextmanager
def read_ahead(read: ReadTensor, steps: Sequence[Sequence[str]]) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Give the tensors of each step by name, in order; while a step is worked on, the next one is read, and no more.

    What reading raises is raised where the step is asked for.
    """

    def read_step(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: read(name) for name in names}

    def ahead(thread: ThreadPoolExecutor) -> Iterator[dict[str, Tensor]]:
        coming: Future[dict[str, Tensor]] | None = None
        for names in steps:
            ready, coming = coming, thread.submit(read_step, names)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()

    with ThreadPoolExecutor(1, thread_name_prefix="reads ahead") as thread:
        yield ahead(thread)
