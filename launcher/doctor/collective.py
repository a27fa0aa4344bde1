"""Try what every job on several ranks needs: that they meet, and that a sum over them is right.

Run by torchrun as `-m launcher.doctor.collective DEVICE`, on each rank.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import takewhile
from typing import Any

import psutil

from launcher.doctor.devices import first_with_cards
from launcher.doctor.finding import Finding, judged

_WAIT_S = 120
# How long ranks may take altogether: to start, to connect and to add up.
_PATIENCE_S = 2.0 * _WAIT_S
# The last line of a traceback; an explained error has its own word behind the name of its class.
_END = re.compile(r"^(?:[\w.]+: )?error: (?=.)|^((?:[a-z_]\w*\.)*\w*(?:Error|Failure|Exception)\b)")
_NUMEL = 2**24  # 64 MiB of float32: what two ranks of a large model exchange at once


def try_ranks(ranks: int | None, device: str | None) -> Iterator[Finding]:
    """Start ranks and have them add numbers up; nothing without a number of ranks."""
    if ranks is None:
        yield Finding("--", "collectives", "not tried", "--ranks 2 starts two ranks and tries them")
        return
    device = device or first_with_cards()
    tried = f"{ranks} rank{'s' * (ranks > 1)} on {device}"
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *starter, "-m", "launcher.doctor.collective", device]
    own = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environ = {**own, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with psutil.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            output, said = started.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            # Not the starter alone: its ranks would go on.
            for process in (*started.children(recursive=True), started):
                process.kill()
            yield Finding("!!", "collectives", f"{tried} hang", "look at the variables and host name above")
            return
    told = [line for line in output.splitlines() if line.startswith("{")]
    if started.returncode or not told:
        yield Finding("!!", "collectives", f"{tried} failed: {cause(said)}", shlex.join(command))
        return
    found = json.loads(told[0])
    yield judged(
        "collectives",
        f"{tried} over {found['backend']}: a sum of 64 MiB takes {found['seconds']:.3f} s",
        "the sum is wrong: do not run jobs on these devices",
        is_well=found["is_right"],
    )


def cause(said: str) -> str:
    """Return with which words the first rank that failed ended; torchrun's own account of it comes after them."""
    lines = [line for line in said.splitlines() if line.strip()]
    ends = (index for index, line in enumerate(lines) if _END.match(line) and "ChildFailedError" not in line)
    first = next(ends, None)
    if first is None:
        return lines[-1].strip() if lines else "nobody said why"
    # An explained error goes on: where, why, what to try.
    more = takewhile(lambda line: line.startswith("  "), lines[first + 1 :])
    return "; ".join([_END.sub(r"\1", lines[first]), *(" ".join(line.split()) for line in more)])


def main() -> None:
    """Add up numbers over all ranks, on the device that a job would use; rank 0 prints what it found."""
    import torch
    import torch.distributed as dist

    from launcher.devices.choice import choose_backend, choose_device_index, find_cards
    from launcher.devices.launch import read_launch

    launch, cards = read_launch(os.environ), find_cards(sys.argv[1], os.environ)
    index, _ = choose_device_index(cards, 0, launch)
    device = torch.device(cards.kind.name, *([index] if cards.kind.has_cards else []))
    if cards.kind.has_cards:
        torch.accelerator.set_device_index(index)
    backend, _ = choose_backend(device, shared=cards.shared_by(launch))
    cards.kind.set_environment(os.environ)
    dist.init_process_group(backend, timeout=timedelta(seconds=_WAIT_S))
    numbers = torch.full((_NUMEL,), float(launch.rank + 1), device=device)
    first = numbers.clone()
    dist.all_reduce(first)  # it also connects
    first[0].item()  # waits for the device
    began = time.perf_counter()
    dist.all_reduce(numbers)
    right: Any = (numbers == launch.world * (launch.world + 1) / 2).all().item()  # waits for the device
    seconds = time.perf_counter() - began
    if launch.rank == 0:
        print(json.dumps({"backend": backend, "seconds": seconds, "is_right": bool(right)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
