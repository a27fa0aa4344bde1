"""One of several ranks that fetch a model from a hub and say where they have it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.config.job_config import JobConfig, RankOptions
from launcher.devices.launch import read_launch
from launcher.failure.monitor import Monitor
from launcher.ranks.process_group import join, part
from launcher.stages.fetch import fetch
from model_adapters import load_adapter
from quant_core.errors import InputError
from tests.support.model_hub import OWNER_AND_NAME

# Seconds; the hub of the test takes longer.
TIMEOUT_S = 6


@contextmanager
def a_folder_on_rank_1(rank: int) -> Iterator[None]:
    """Have rank 1 work for a while where a folder has the name of the hub id's owner, as another host may."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / OWNER_AND_NAME).mkdir(parents=True)
        os.chdir(folder if rank == 1 else here)
        try:
            yield
        finally:
            os.chdir(here)


def _say(line: str) -> None:
    """Write a line at once, so that the lines of two ranks cannot run into each other in the pipe they share."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Fetch, and print the folder."""
    options = load_adapter("flux").options(path=OWNER_AND_NAME, device_type="A2-32g-dual")
    config = JobConfig(model="flux", pipeline=options, ranks=RankOptions(device="cpu", timeout_s=TIMEOUT_S))
    watch = Monitor(config)
    ranks = join(config, read_launch(os.environ), watch.rendezvous.groups)
    with suppress(InputError), a_folder_on_rank_1(ranks.rank):
        fetch(config, ranks, watch)
        _say(f"rank {ranks.rank} went on")
    _say(f"rank {ranks.rank} reads {fetch(config, ranks, watch).pipeline.path}")
    part(ranks)


if __name__ == "__main__":
    main()
