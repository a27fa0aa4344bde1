"""What the launcher knows of a model: a bundle of data and a few functions, one bundle per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model_adapters.inputs import TransformerInputs
from model_adapters.options import DtypeName, PipelineOptions
from model_adapters.parallel.shard_plan import ShardPlan
from quant_core.errors import ConfigurationError, suggestion
from quant_core.structure import ModelStructure

# What the pipeline takes in place of a batch of prompts, by the names of its arguments.
Embeddings = Mapping[str, Tensor]


class Encode(Protocol):
    """Encode a batch of prompts with the pipeline's text encoders, with the model's own arguments."""

    def __call__(self, pipeline: Any, prompts: list[str], options: Any) -> Embeddings: ...


class Generate(Protocol):
    """Run the pipeline once for a batch of encoded prompts.

    generators: one for each prompt, or one for all; whatever is drawn on the way comes from them. decodes: whether
    anybody looks at the results; if not, denoising is enough and nothing behind it runs. Returns the results (latents,
    if not decoded) in the order of the prompts.
    """

    def __call__(
        self, pipeline: Any, embeddings: Embeddings, options: Any, generators: Any, *, decodes: bool = True
    ) -> Sequence[Any]: ...


@dataclass(frozen=True)
class ResultFormat:
    """Say how a result of a generation (an image, a video) becomes a file: its suffix, and how it is written."""

    suffix: str
    save: Callable[[Any, Path], object]


@dataclass(frozen=True)
class ModelAdapter:
    """Describe one model: its classes, layouts, recipes and how to run it.

    `transformer_class` and `pipeline_class` are names in the module `library`; `shard_plans` are by layout, the default
    first; `disabled_layers` maps a quantization type to the patterns of layers that its recipe keeps float.
    `approximate` returns a context in which the pipeline may approximate steps; `step_index` returns the denoising step
    that the current call of the pipeline's transformer belongs to, from 0. `set_timesteps` gives a scheduler the steps
    that the pipeline would, from the options and their number; without it, rows serve the calibrated steps only.
    `check_options` refuses options that do not fit the transformer's configuration.
    """

    name: str
    options: type[PipelineOptions]
    transformer_class: str
    pipeline_class: str
    default_dtype: DtypeName
    shard_plans: Mapping[str, ShardPlan]
    structure: ModelStructure
    disabled_layers: Mapping[str, tuple[str, ...]]
    encode: Encode
    transformer_inputs: Callable[[Any, Any, torch.dtype], TransformerInputs]
    generate: Generate
    step_index: Callable[[Any], int]
    result: ResultFormat
    approximate: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    set_timesteps: Callable[[Any, Any, int], object] | None = None
    check_options: Callable[[Any, Any], object] = lambda config, options: None
    library: str = "diffusers"

    def transformer_type(self) -> Any:
        """Return the class of the transformer."""
        return getattr(import_module(self.library), self.transformer_class)

    def pipeline_type(self) -> Any:
        """Return the class of the pipeline."""
        return getattr(import_module(self.library), self.pipeline_class)

    def dtype(self, options: PipelineOptions) -> torch.dtype:
        """Return the dtype to compute in: the chosen one, else the model's own."""
        return getattr(torch, options.dtype or self.default_dtype)

    def shard_plan(self, layout: str | None = None) -> ShardPlan:
        """Return the plan of a layout, or of the default layout; ConfigurationError for an unknown one."""
        if layout is None:
            return next(iter(self.shard_plans.values()))
        if layout in self.shard_plans:
            return self.shard_plans[layout]
        raise ConfigurationError(
            f"{self.name} has no layout '{layout}'",
            where="--layout",
            why=f"its layouts are {', '.join(self.shard_plans)}",
            advice=suggestion(layout, self.shard_plans),
        )
