"""Train by steps: a budget that is counted and not timed, and a checkpoint that an interruption cannot damage.

Every random number of a step comes from a generator seeded by (seed, stage, step), and everything else that a step
reads is in the checkpoint. So a training that was interrupted and run again ends with the same bytes as one that was
not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_core.errors import InputError
from scripts.tiny_training.drawing import Scene

Report = Callable[[str], object]


@dataclass(frozen=True)
class Budget:
    """Say how long and how fast to train; `rate` is the highest learning rate, reached after `warm_up` steps."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 100
    checkpoint_every: int = 200
    report_every: int = 50

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise, then half a cosine down to zero."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Setting:
    """Hold what every stage of a training shares.

    `work`: folder of the checkpoints; `placements`: how often each of `scenes` is drawn for the transformer.
    """

    work: Path
    seed: int
    scenes: tuple[Scene, ...]
    placements: int
    device: str = "cpu"
    report: Report = print


def seeded(seed: int, stage: str, step: int = 0) -> torch.Generator:
    """Return the generator of one step of one stage; it lives on the CPU, so that a GPU sees the same numbers."""
    number = seed << 32 | step
    for letter in stage.encode():
        number = (number * 257 + letter) % (1 << 61)
    return torch.Generator().manual_seed(number)


def train(
    modules: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    budget: Budget,
    checkpoint: Path,
    recipe: str,
    report: Report = print,
) -> None:
    """Train `modules` in place, from `checkpoint` if there is one; a finished training is only loaded.

    `recipe` names what is trained; a checkpoint of another one is refused. Raises InputError.
    """
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=budget.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    recipe = f"{recipe} {budget}"
    first = _load(checkpoint, recipe, modules, optimizer)
    started, losses = time.monotonic(), []
    for step in range(first, budget.steps):
        for group in optimizer.param_groups:
            group["lr"] = budget.rate_at(step)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % budget.checkpoint_every == 0 or done == budget.steps:
            _save(checkpoint, recipe, modules, optimizer, done)
        if done % budget.report_every == 0 or done == budget.steps:
            seconds = (time.monotonic() - started) / (done - first)
            mean = sum(losses) / len(losses)
            losses.clear()
            report(f"{checkpoint.stem} step {done}/{budget.steps} loss {mean:.4f} {seconds:.2f} s/step")


def _save(file: Path, recipe: str, modules: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"recipe": recipe, "step": step, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, file)


def _load(file: Path, recipe: str, modules: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a checkpoint and return the number of steps it has behind it; 0 where there is none."""
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe:
        raise InputError(
            f"{file} belongs to another training",
            where="checkpoint of a tiny model",
            why=f"it was made by {state['recipe']}, this is {recipe}",
            advice="name another --work folder, or remove the file to start anew",
        )
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
