"""Do the least that leads to a first forward on each rank: the floor of the launcher's start.

    torchrun --nproc_per_node 2 scripts/bench/plain_start.py PIPELINE PROMPTS
    python scripts/bench/plain_start.py PIPELINE PROMPTS

It imports torch and diffusers, connects the ranks if there are any, loads the pipeline, and calls it. When the
transformer was first called goes to `$BENCH_MARKS`/rank<n>.json, in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils import logging


def main(folder: str, prompts: str) -> None:
    """Run from the command line."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rank = os.environ.get("RANK")  # none outside of torchrun
    if rank is not None:
        dist.init_process_group("gloo")
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)

    def note(*_: object) -> None:
        marks = {"first forward": time.time(), "modules": float(len(sys.modules))}
        Path(os.environ["BENCH_MARKS"], f"rank{rank or 0}.json").write_text(json.dumps(marks))

    pipeline.transformer.register_forward_pre_hook(note)
    pipeline.set_progress_bar_config(disable=True)
    prompt = Path(prompts).read_text().splitlines()[0]
    pipeline(prompt, width=64, height=64, num_inference_steps=1, output_type="latent")
    if rank is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
