"""One rank that encodes, then calibrates, and writes what it held of the embeddings after each.

Usage: embeddings_worker.py RESULTS_FOLDER FLAGS... Rank r writes RESULTS_FOLDER/<r>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launcher.cli.command_line import parse
from launcher.run import _on_ranks
from launcher.stages.calibrate import calibrate
from launcher.stages.encode import encode
from launcher.stages.identify import identify
from launcher.stages.job import Job


def held(job: Job) -> dict[str, Any]:
    """Say how many tensors of each name there are, and what they add up to."""
    names: dict[str, list[Any]] = {}
    for embeddings in job.model.embeddings.values():
        for name, tensor in embeddings.items():
            names.setdefault(name, []).append(tensor)
    return {
        name: (len({tensor.data_ptr() for tensor in tensors}), sum(float(tensor.double().sum()) for tensor in tensors))
        for name, tensors in names.items()
    }


def main(results: str, *words: str) -> None:
    """Do both as a job does."""

    def work(job: Job) -> None:
        encode(job)
        encoded = held(job)
        calibrate(job, identify(job))
        Path(results, f"{job.ranks.rank}.json").write_text(json.dumps([encoded, held(job)]))

    _on_ranks(parse([*words]).options, None, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
