"""The noise level of each denoising step, as the pipeline's own scheduler says, without the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from model_adapters.adapter import ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.weights.model_folder import pipeline_folder, read_json
from quant_core.errors import InputError

_SETTINGS = "scheduler/scheduler_config.json"


def scheduler_settings(path: str) -> dict[str, Any]:
    """Return the settings of the scheduler in a pipeline's folder."""
    return read_json(pipeline_folder(path) / _SETTINGS)


def noise_levels(
    adapter: ModelAdapter, settings: Mapping[str, Any], options: PipelineOptions, steps: int
) -> list[float] | None:
    """Return sigma of each step, falling.

    None for a model whose adapter sets no timesteps, and for a scheduler that stays at a level for more than one step:
    rows of one level differ by more than it.
    """
    if adapter.set_timesteps is None:
        return None
    scheduler = _scheduler(adapter, settings, options, steps)
    levels = [float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
    return levels if all(one > other for one, other in pairwise(levels)) else None


def steps_of(adapter: ModelAdapter, options: PipelineOptions) -> int:
    """Return how often the pipeline steps for an image, which is more than is asked for where steps are computed twice.

    Raises InputError for a scheduler that the pipeline cannot use.
    """
    if adapter.set_timesteps is None or not (pipeline_folder(options.path) / _SETTINGS).exists():
        return options.infer_steps
    scheduler = _scheduler(adapter, scheduler_settings(options.path), options, options.infer_steps)
    return len(scheduler.timesteps)


def _scheduler(adapter: ModelAdapter, settings: Mapping[str, Any], options: PipelineOptions, steps: int) -> Any:
    """Return a scheduler of these settings that has the pipeline's steps."""
    import diffusers

    assert adapter.set_timesteps is not None, "the caller looked"
    name = settings.get("_class_name", "of no class")
    try:
        scheduler = getattr(diffusers, name).from_config(dict(settings))
        adapter.set_timesteps(scheduler, options, steps)
    except Exception as error:  # whatever a scheduler refuses its settings or the pipeline's steps with
        raise InputError(
            f"{adapter.pipeline_class} cannot use the scheduler {name}",
            where=f"{options.path}: {_SETTINGS}",
            why=f"giving it {steps} steps as the pipeline does ended with {type(error).__name__}: {error}",
            advice="give the folder the scheduler that the model was published with",
        ) from error
    return scheduler


def shift(scheduler: Any, tokens: int, max_shift: float) -> float:
    """Return by how much the pipelines of images shift the steps of an image with so many tokens.

    max_shift: the pipeline's own, for a scheduler that says none.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(
        tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", max_shift),
    )
