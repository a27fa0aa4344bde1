"""Measure what a job of the real model's size costs: wall time, peak memory of every rank, size of what it publishes.

    python scripts/measure_full_size.py demo/flux-full demo/flux-full-out --nproc_per_node 2

Runs `w8a8_dynamic` in the dual-card layout on CPU with `--calibrate needed`, on a folder that
`make_full_size_transformer.py` made (or the real one). Words after `--` go to the launcher as they are.

Peak memory is the kernel's own high-water mark of the resident set (VmHWM), which counts mapped file pages too; it
is read while the ranks run, because it dies with them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
# Often enough that the last reading misses nothing: a mark only grows.
_SAMPLE_S = 0.2
_PROMPT = "A photo of an astronaut riding a horse on mars\n"


def measure(command: Sequence[str]) -> tuple[int, float, dict[int, int]]:
    """Run a torchrun command, its lines stamped with the time; returns exit code, seconds, peak bytes by rank."""
    start, peaks = time.monotonic(), dict[int, int]()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(psutil.Process(process.pid), peaks, done))
    sampler.start()
    for line in process.stdout:
        print(f"{time.monotonic() - start:7.1f} s  {line}", end="", flush=True)
    code = process.wait()
    done.set()
    sampler.join()
    return code, time.monotonic() - start, peaks


def _sample(parent: psutil.Process, peaks: dict[int, int], done: threading.Event) -> None:
    ranks: dict[int, int] = {}
    while not done.wait(_SAMPLE_S):
        try:
            for child in parent.children(recursive=True):
                rank = ranks.setdefault(child.pid, int(child.environ().get("RANK", -1)))
                if rank >= 0:
                    peaks[rank] = max(peaks.get(rank, 0), high_water_mark(child.pid))
        except (psutil.Error, OSError, ValueError):
            continue  # a process that is ending


def high_water_mark(pid: int) -> int:
    """Return the peak resident set of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} has no resident set any more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the job's exit code."""
    parser = argparse.ArgumentParser(description="Measure a job of the real model's size.")
    parser.add_argument("folder", type=Path, metavar="PIPELINE", help="pipeline folder with the transformer")
    parser.add_argument("output", type=Path, metavar="OUT", help="new folder for the shards")
    parser.add_argument("--nproc_per_node", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("flags", nargs="*", help="further flags of the launcher, after --")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    prompts = asked.output / "prompts.txt"
    prompts.write_text(_PROMPT)
    prompts.chmod(0o640)
    code, seconds, peaks = measure(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={asked.nproc_per_node}", "-m", "launcher", "flux"),
            *("--path", str(asked.folder.resolve()), "--prompt_path", str(prompts.resolve()), "--device", "cpu"),
            *("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic", "--calibrate", "needed", "--do_quant"),
            *("--quant_weight_save_folder", str(asked.output.resolve() / "weights")),
            *("--quant_dump_calib_folder", str(asked.output.resolve() / "dumps"), *asked.flags),
        ]
    )
    print(f"\nexit code {code}, {seconds:.0f} s")
    for rank, peak in sorted(peaks.items()):
        print(f"rank {rank}: peak resident memory {peak / 2**30:.2f} GiB")
    for path in sorted((asked.output / "weights").glob("*.safetensors")):
        print(f"{path.name}: {path.stat().st_size / 2**30:.2f} GiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
