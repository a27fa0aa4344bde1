"""The noise level of each denoising step, as the pipeline's own scheduler says, without the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from model_adapters.adapter import ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.weights.model_folder import pipeline_folder, read_json

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
    import diffusers

    scheduler = getattr(diffusers, settings["_class_name"]).from_config(dict(settings))
    adapter.set_timesteps(scheduler, options, steps)
    levels = [float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
    return levels if all(one > other for one, other in pairwise(levels)) else None


def set_shifted_timesteps(scheduler: Any, steps: int, tokens: int, **spacing: Any) -> None:
    """Set a flow-matching scheduler's timesteps as the pipelines of images do, shifted by the number of tokens.

    spacing: the sigmas to shift, where the pipeline gives its own.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, given = scheduler.config, {"num_inference_steps": steps, **spacing}
    if config.get("use_dynamic_shifting"):
        given["mu"] = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    scheduler.set_timesteps(**given)
