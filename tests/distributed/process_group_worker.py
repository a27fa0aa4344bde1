"""One rank of the process group's proof: runs every check in one start and writes what it saw.

Usage: torchrun ... process_group_worker.py RESULTS_FOLDER FLAGS... Rank r writes RESULTS_FOLDER/<r>.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.cli.command_line import parse
from launcher.devices.launch import read_launch
from launcher.failure.exit_codes import exit_code
from launcher.failure.phases import run_together
from launcher.ranks.agreement import all_agree, barrier, gather_objects, require_alike
from launcher.ranks.process_group import Ranks, join, part
from quant_core.errors import ExplainedError, InputError


def outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """Run something that should raise an explained error, and describe the error."""
    start = time.monotonic()
    try:
        return {"value": action()}
    except ExplainedError as error:
        return {
            "kind": type(error).__name__,
            "text": str(error),
            "lines": len(str(error).splitlines()),
            "status": int(exit_code(error)),
            "cause": type(error.__cause__).__name__,
            "seconds": time.monotonic() - start,
        }


def groups(ranks: Ranks) -> dict[str, Any]:
    """Describe the groups: their members, their backends, and that each of them sums."""
    found: dict[str, Any] = {}
    for name in ("control", "tp_device_group", "tp_control", "dp_control"):
        group = getattr(ranks, name)
        total = torch.tensor([float(ranks.rank)], device=ranks.device)
        dist.all_reduce(total, group=group)
        members = dist.get_process_group_ranks(group)
        found[name] = {"members": members, "backend": dist.get_backend(group), "sum": total.item()}
    return found


def fails_on(ranks: Ranks, guilty: dict[int, Callable[[], Exception]]) -> dict[str, Any]:
    """Run a stage that fails on some ranks."""

    def stage() -> str:
        if ranks.rank in guilty:
            raise guilty[ranks.rank]()
        return f"result of rank {ranks.rank}"

    return outcome(lambda: run_together(ranks, "quantize", stage))


def bad_file() -> InputError:
    return InputError("weights are truncated", where="w.safetensors", why="8 bytes are missing", advice="copy again")


def late_file() -> InputError:
    time.sleep(0.5)  # so that the other rank's failure is the earlier one on any clock
    return bad_file()


def checks(ranks: Ranks) -> dict[str, Any]:
    """Run every check that leaves the groups intact."""
    last = ranks.world - 1
    return {
        "groups": groups(ranks),
        "gathered": gather_objects(ranks, {"rank": ranks.rank}),
        "result": run_together(ranks, "load", lambda: ranks.rank * 10),
        "all_yes": all_agree(ranks, True),
        "one_no": all_agree(ranks, ranks.rank != last),
        "alike": outcome(lambda: require_alike(ranks, {"seed": 42} if ranks.rank == 0 else None, what="the options")),
        "unlike": outcome(lambda: require_alike(ranks, {"seed": 42, "last": ranks.rank == last}, what="the options")),
        "one_fails": fails_on(ranks, {last: bad_file}),
        "all_fail_alike": fails_on(ranks, dict.fromkeys(range(ranks.world), bad_file)),
        "first_speaks": fails_on(ranks, {0: late_file, last: lambda: ZeroDivisionError("of the last rank")}),
        "out_of_memory": fails_on(ranks, {0: lambda: torch.OutOfMemoryError("tried to allocate 3 GiB")}),
        "goes_on": gather_objects(ranks, ranks.rank),  # errors have not put the ranks out of step
    }


def late_rank(ranks: Ranks) -> dict[str, Any]:
    """Let the last rank stay away from a barrier for longer than the others wait."""
    if ranks.rank == ranks.world - 1:
        time.sleep(3)
        return {}
    return outcome(lambda: barrier(ranks, "the merge", timeout_s=1))


def main(folder: Path, words: list[str]) -> None:
    """Join, check, write, and leave; with ABSENT_RANK=last a rank stays away, and does not say goodbye either."""
    ranks = join(parse(words).options, read_launch(os.environ))
    report: dict[str, Any] = {
        "rank": ranks.rank,
        "local_rank": ranks.mesh.launch.local_rank,
        "world": ranks.world,
        "device": str(ranks.device),
        "backend": ranks.backend,
        "source": ranks.mesh.launch.source,
        "is_distributed": ranks.is_distributed,
        "mesh": [ranks.mesh.dp_rank, ranks.mesh.tp_rank, ranks.mesh.tp_size],
        "reasons": ranks.reasons,
        "threads": torch.get_num_threads(),
    }
    absent = os.environ.get("ABSENT_RANK") == "last"
    report["absent" if absent else "checks"] = late_rank(ranks) if absent else checks(ranks)
    if not absent or ranks.rank < ranks.world - 1:
        part(ranks)
        report["left"] = not dist.is_initialized()
    (folder / f"{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
