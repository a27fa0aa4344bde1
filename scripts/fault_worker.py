"""Run the launcher with one fault in it: what `fault_matrix.py` starts instead of `-m launcher`.

The fault is put in from outside, by wrapping a function of the product at a stage boundary; the product has no branch
for it. FAULT names it as JSON: kind, stage, rank, and the file to touch at the moment it strikes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FILLER = "filler"
# What somebody outside touches when it has done its part.
ACTED = "acted"
_CLONE_NEWNS = 0x20000  # <linux/sched.h>


def _raise(error: BaseException) -> NoReturn:
    raise error


def _fill_the_disk(folder: Path) -> None:
    """Leave not a byte on a file system that was mounted for this, and touch no other."""
    if not folder.is_mount():
        raise RuntimeError(f"{folder} is no file system of its own: not filled")
    with (folder / FILLER).open("wb") as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(shutil.disk_usage(folder).free or 1))
            filler.flush()


def _no_device_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB (injected)")


def _compute_other_numbers() -> None:
    """Let every step of the scheduler from now on end a little beside where it should."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    _after(FlowMatchEulerDiscreteScheduler, "step", lambda result: (result[0] * 1.01, *result[1:]))


def _wait_for_the_other(folder: Path) -> None:
    """Stand still until somebody outside has done its part."""
    while not (folder / ACTED).exists():
        time.sleep(0.02)


def _see_a_disk_of_its_own(folder: Path) -> None:
    """Lay an empty file system over the folder of the weights, for this process alone: another host's disk."""
    weights = folder / "weights"
    weights.mkdir(mode=0o750, exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no name space of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(weights)], check=True)


# What strikes, given the folder of the run.
KINDS: dict[str, Callable[[Path], object]] = {
    "kill -9": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "exception": lambda _: _raise(RuntimeError("injected")),
    "OOM error": lambda _: _no_device_memory(),
    "full disk": _fill_the_disk,
    "frozen": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "other numbers": lambda _: _compute_other_numbers(),
    "own disk": _see_a_disk_of_its_own,
    "wait": _wait_for_the_other,
    "nothing": lambda _: None,
}


def in_start(strike: Callable[[], object]) -> None:
    """Strike before anything is imported."""
    strike()


def in_load(strike: Callable[[], object]) -> None:
    """Strike while the model is being loaded."""
    from launcher.stages import calibrate

    _before_stage(calibrate, "loading the model", strike)


def in_batch(strike: Callable[[], object]) -> None:
    """Strike before the second batch."""
    from launcher.stages import images

    _before(images, "prompts_of", lambda batch: batch[0].number == 1, strike)


def in_calibrate(strike: Callable[[], object]) -> None:
    """Strike after the second batch, before its records are saved."""
    from launcher.files.calibration_parts import CalibrationParts

    _before(CalibrationParts, "save", lambda parts, batch, records: batch == 1, strike)


def in_quantize(strike: Callable[[], object]) -> None:
    """Strike after the second record has been replayed."""
    from launcher.stages import quantize

    _before(quantize, "_progress", lambda job, stage, done, total: done == 2, strike)


def in_observe(strike: Callable[[], object]) -> None:
    """Strike after the second record has been observed."""
    from launcher.stages import quantize

    _before(quantize, "_progress", lambda job, stage, done, total: (stage, done) == ("observe", 2), strike)


def in_write(strike: Callable[[], object]) -> None:
    """Strike when the shard is about to be written."""
    from quant_core.session import quantize

    _before(quantize, "_save", lambda *_, **__: True, strike)


def in_publish(strike: Callable[[], object]) -> None:
    """Strike rank 0 when all shards are staged and none is published."""
    from launcher.stages import merge

    _before(merge, "publish_shards", lambda *_, **__: True, strike)


def in_merge(strike: Callable[[], object]) -> None:
    """Strike rank 0 between the renaming of the shards and the manifest, the others while they wait for it."""
    if os.environ["RANK"] == "0":
        from launcher.files.manifest import Manifest

        _before(Manifest, "write", lambda *_: True, strike)
    else:
        from launcher.stages import merge

        _before_stage(merge, "merging", strike)


def in_end(strike: Callable[[], object]) -> None:
    """Strike when nothing is left to do but to tell the others so."""
    from launcher import run

    _before(run, "barrier", lambda *_: True, strike)


PLACES: dict[str, Callable[[Callable[[], object]], None]] = {
    "start": in_start,
    "load": in_load,
    "batch": in_batch,
    "calibrate": in_calibrate,
    "quantize": in_quantize,
    "observe": in_observe,
    "write": in_write,
    "publish": in_publish,
    "merge": in_merge,
    "end": in_end,
}


def _before(owner: Any, name: str, when: Callable[..., bool], strike: Callable[[], object]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            strike()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def _before_stage(module: Any, stage: str, strike: Callable[[], object]) -> None:
    original = module.run_together

    def wrapped(ranks: Any, name: str, work: Callable[[], Any]) -> Any:
        return original(ranks, name, (lambda: (strike(), work())[1]) if name == stage else work)

    module.run_together = wrapped


def put_in(fault: dict[str, Any]) -> None:
    """Wrap the function in which the fault is to strike."""

    mark = Path(fault["mark"])

    def strike() -> None:
        if not mark.exists():  # once: a rank that torchrun restarts is to get through
            mark.touch()
            KINDS[fault["kind"]](mark.parent)

    PLACES[fault["stage"]](strike)


if __name__ == "__main__":
    from launcher.__main__ import main

    wanted = json.loads(os.environ.get("FAULT", "null"))
    if wanted is not None and os.environ.get("RANK") == str(wanted["rank"]):
        put_in(wanted)
    main(entry=(__file__,))
