"""Rows of another number of steps, made from those of 50, against rows that were calibrated with that number.

Every step is static, so that every row counts. Pictures are compared in pairs: the same prompt and noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from torch import nn

from model_adapters.pipeline.noise_levels import noise_levels, scheduler_settings
from quant_core import SaveProcessorConfig, SessionConfig
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.checkpoint.resampling import Levels, write_resampled
from quant_core.session.quantize import checkpoint_files
from scripts.choices.asked import Asked, mean_and_error
from scripts.study.grid import Method
from scripts.study.subject import Subject

OLD, NEW = 50, (28, 20)
_METHOD = Method("w8a8_timestep")


def rows(asked: Asked) -> Iterator[Sequence[str]]:
    """Yield the table: the output's ratio and the pictures' of both, and by how much `restep` is better."""
    yield ("model", "steps", "output, calibrated", "output, restep", "PSNR, calibrated", "PSNR, restep", "difference")
    yield ("---",) * 7
    for model in asked.models:
        calibrated = {seed: published(asked.subject(model, seed, OLD)) for seed in asked.seeds}
        for steps in NEW:
            cells = [compared(asked.subject(model, seed, steps), found) for seed, found in calibrated.items()]
            outputs = [[cell[place][0] for cell in cells] for place in (0, 1)]
            psnrs = [[one for cell in cells for one in cell[place][1]] for place in (0, 1)]
            means = [f"{mean(each):.2f}" for each in (*outputs, *psnrs)]
            yield (model, str(steps), *means, mean_and_error([b - a for a, b in zip(*psnrs)]))


def compared(subject: Subject, old: tuple[Subject, Checkpoint]) -> list[tuple[float, list[float]]]:
    """Return output and pictures in decibels, of calibrated rows and of those that follow from the old ones."""
    models = {"calibrated": subject.quantized(_config(subject)), "restep": _restepped(subject, *old)}
    return [(subject.output(each).overall.decibels, subject.psnrs(each, name)) for name, each in models.items()]


def published(subject: Subject) -> tuple[Subject, Checkpoint]:
    """Quantize and write a checkpoint."""
    save = SaveProcessorConfig(output_path=str(subject.work))
    config = _config(subject)
    processors = {**config.processor_cfg_map, "save": save}
    subject.quantized(config.model_copy(update={"processor_cfg_map": processors}))
    return subject, open_checkpoint(checkpoint_files(save, _METHOD.scheme))


def _config(subject: Subject) -> SessionConfig:
    return subject.session(_METHOD, timestep_sep=0)


def _restepped(subject: Subject, old: Subject, checkpoint: Checkpoint) -> nn.Module:
    """Return the model with the checkpoint's rows at the subject's noise levels, as `launcher restep` makes them."""
    files = CheckpointFiles(
        *(_beside(subject, path) for path in (checkpoint.files.weights, checkpoint.files.description))
    )
    write_resampled(checkpoint, Levels(_levels(old), _levels(subject)), files, {})
    model = copy.deepcopy(subject.transformer)
    load_deployed(model, files)
    return model


def _beside(subject: Subject, path: Path) -> Path:
    subject.work.mkdir(parents=True, exist_ok=True)
    return subject.work / path.name


def _levels(subject: Subject) -> Sequence[float]:
    options = subject.options
    found = noise_levels(subject.adapter, scheduler_settings(options.path), options, options.infer_steps)
    assert found is not None, "both models set their timesteps"
    return found
