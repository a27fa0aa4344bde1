"""What the launcher knows of a model: a bundle of data and a few functions, one bundle per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from model_adapters.inputs import TransformerInputs
from model_adapters.options import DeviceType, DtypeName, PipelineOptions
from model_adapters.parallel.shard_plan import ShardPlan
from model_adapters.pipeline.generation import generate
from model_adapters.pipeline.step_index import step_index
from quant_core.errors import ConfigurationError, nearest
from quant_core.structure import ModelStructure

# What the pipeline takes in place of a batch of prompts, by the names of its arguments.
Embeddings = Mapping[str, Tensor]


class Encode(Protocol):
    """Encode a batch of prompts with the pipeline's text encoders, with the model's own arguments."""

    def __call__(self, pipeline: Any, prompts: list[str], options: Any) -> Embeddings: ...


class Generate(Protocol):
    """Run the pipeline once for a batch of encoded prompts, one image for each.

    `generator` is one torch generator or one per prompt; `output_type` is diffusers' ("pil", "latent", "pt", "np").
    Returns the images in the order of the prompts.
    """

    def __call__(
        self, pipeline: Any, embeddings: Embeddings, options: Any, generator: Any, output_type: str = "pil"
    ) -> Any: ...


@dataclass(frozen=True)
class ModelAdapter:
    """Describe one model: its classes, layouts, recipes and how to run it.

    `transformer_class` and `pipeline_class` are names in diffusers; `shard_plans` are by layout, the default first;
    `disabled_layers` maps a quantization type to the patterns of layers that its recipe keeps float.
    """

    name: str
    options: type[PipelineOptions]
    device_types: Mapping[str, DeviceType]
    transformer_class: str
    pipeline_class: str
    default_dtype: DtypeName
    shard_plans: Mapping[str, ShardPlan]
    structure: ModelStructure
    disabled_layers: Mapping[str, tuple[str, ...]]
    encode: Encode
    transformer_inputs: Callable[[Any, Any, torch.dtype], TransformerInputs]
    generate: Generate = generate
    step_index: Callable[[Any], int] = step_index

    def transformer_type(self) -> Any:
        """Return diffusers' class of the transformer."""
        return getattr(diffusers, self.transformer_class)

    def pipeline_type(self) -> Any:
        """Return diffusers' class of the pipeline."""
        return getattr(diffusers, self.pipeline_class)

    def dtype(self, options: PipelineOptions) -> torch.dtype:
        """Return the dtype to compute in: the chosen one, else the model's own."""
        return getattr(torch, options.dtype or self.default_dtype)

    def shard_plan(self, layout: str | None = None) -> ShardPlan:
        """Return the plan of a layout, or of the default layout; ConfigurationError for an unknown one."""
        if layout is None:
            return next(iter(self.shard_plans.values()))
        if layout in self.shard_plans:
            return self.shard_plans[layout]
        names = ", ".join(self.shard_plans)
        close = nearest(layout, self.shard_plans)
        raise ConfigurationError(
            f"{self.name} has no layout '{layout}'",
            where="--layout",
            why=f"its layouts are {names}",
            advice=f"{close} (nearest name)" if close else f"one of {names}",
        )
