"""What a person may choose about the toy model: how long its signals are."""

from __future__ import annotations

from pydantic import Field

from model_adapters.options import PipelineOptions

DEFAULTS: dict[str, object] = {"quant_type": "w8a8_timestep"}


class ToyOptions(PipelineOptions):
    """Choose a toy pipeline, its prompts and its signals."""

    length: int = Field(default=16, ge=1, description="samples of a signal")


OPTIONS = ToyOptions
