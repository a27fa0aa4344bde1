"""One of several ranks that fetch a model from a hub and say where they have it."""

from __future__ import annotations

import os
import sys

from launcher.config.job_config import JobConfig, RankOptions
from launcher.devices.launch import read_launch
from launcher.failure.monitor import Monitor
from launcher.ranks.process_group import join, leave
from launcher.stages.fetch import fetch
from model_adapters import load_adapter
from tests.support.model_hub import OWNER_AND_NAME

# Seconds; the hub of the test takes longer.
TIMEOUT_S = 6


def main() -> None:
    """Fetch, and print the folder."""
    options = load_adapter("flux").options(path=OWNER_AND_NAME, device_type="A2-32g-dual")
    config = JobConfig(model="flux", pipeline=options, ranks=RankOptions(device="cpu", timeout_s=TIMEOUT_S))
    watch = Monitor(config)
    ranks = join(config, read_launch(os.environ), watch.rendezvous.groups)
    # One write, so that the lines of two ranks cannot run into each other in the pipe they share.
    sys.stdout.write(f"rank {ranks.rank} reads {fetch(config, ranks, watch).pipeline.path}\n")
    sys.stdout.flush()
    leave(ranks)


if __name__ == "__main__":
    main()
