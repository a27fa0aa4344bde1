"""Hold this rank's model for the stages of a job: loaded when first needed, and no part longer than needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from launcher.config.job_config import JobConfig
from launcher.devices.host_memory import return_large_blocks
from launcher.ranks.process_group import Ranks
from launcher.stages.online import check_online, needs_prompts, reason_to_replay, takes_ranges
from launcher.stages.processors import disabled_layers_of, processors, session_of
from model_adapters import load_adapter
from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.pipeline.noise_levels import steps_of
from model_adapters.pipeline.offload import run_block_by_block
from model_adapters.pipeline.prompt_encoding import Prompts, release_memory
from model_adapters.weights.brought import Brought
from model_adapters.weights.loading import LoadedTransformer, load_part, load_pipeline, release_pipeline
from model_adapters.weights.model_folder import check_tokenizers, pipeline_folder
from model_adapters.weights.transformer_part import TransformerPart, describe_transformer
from quant_core.attention.rotated_values import find_rotations
from quant_core.schemes import SCHEMES
from quant_core.session.checks import check_outputs
from quant_core.session.streaming import reads_activations
from quant_core.session.targets import layer_plan
from quant_core.smoothing.smooth import groups_to_smooth


@dataclass
class ModelSession:
    """Load this rank's part of the transformer, and the pipeline around it."""

    config: JobConfig
    ranks: Ranks
    # Whether the job evaluates what is published and does nothing else: what calibrating needs, it does not.
    only_evaluates: bool = False
    adapter: ModelAdapter = field(init=False)
    _transformer: LoadedTransformer | None = None
    _pipeline: Any = None
    # Whether quantizing has to replay calibration data; known once the job was checked.
    reads_activations: bool = True
    # Whether calibrating takes what quantizing needs, and if not although it was asked to, why; known likewise.
    is_online: bool = False
    reason_to_replay: str | None = None
    # On the host, by batch of prompts; filled before the transformer is loaded.
    embeddings: dict[Prompts, Embeddings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        return_large_blocks()
        self.adapter = load_adapter(self.config.model)

    @property
    def disabled_layers(self) -> tuple[str, ...]:
        """Return the patterns of layers to keep float."""
        return disabled_layers_of(self.config.quantization, self.adapter)

    @property
    def needs_prompts(self) -> bool:
        """Tell whether the job has a use for prompts of its own."""
        return not self.only_evaluates and needs_prompts(self.config, reads_activations=self.reads_activations)

    @property
    def layout(self) -> str:
        """Return the name of the shard plan: the chosen one, else the model's first."""
        return self.adapter.shard_plan(self.config.ranks.layout).name

    @property
    def offloads(self) -> bool:
        """Tell whether the chosen hardware set-up keeps on the card only what runs."""
        hardware = self.config.pipeline.hardware
        return hardware is not None and hardware.cpu_offload

    def check(self) -> None:
        """Refuse, before anything is loaded, what would fail later: folder, layout, weight files, layer patterns."""
        part = self.describe()
        self.adapter.check_options(getattr(part.model, "config"), self.config.pipeline)  # noqa: B009, a Module has none
        if self.config.quantization.do_quant:
            self._check_quantization(part.model)
        if self.needs_prompts or self.config.evaluation.evaluate:  # on prompts of its own, or on those of pictures
            check_tokenizers(pipeline_folder(self.config.pipeline.path))
            steps_of(self.adapter, self.config.pipeline)

    def _check_quantization(self, model: nn.Module) -> None:
        """Refuse patterns without a layer, options that exclude each other, and what finds nothing to work on."""
        options = self.config.quantization
        session = session_of(processors(options, self.disabled_layers), options, [])
        targets = layer_plan(model, session)
        check_outputs(model, {name: SCHEMES[config.key] for name, config in targets.items()})
        reads = self.reads_activations = reads_activations(model, session)
        check_online(self.config, session, reads_activations=reads)
        self.is_online = takes_ranges(self.config, session, reads_activations=reads)
        if self.config.output.calibrate == "online" and reads:
            self.reason_to_replay = reason_to_replay(self.config, session)
        if session.smoothing is not None:
            groups_to_smooth(model, session.smoothing, structure=self.adapter.structure, targets=targets)
        if session.rotate_values:
            find_rotations(model, self.adapter.structure, targets=targets)

    @property
    def transformer(self) -> LoadedTransformer:
        """Return this rank's part of the transformer, reading it from disk the first time."""
        if self._transformer is None:
            self._transformer = load_part(self.describe(), "cpu" if self.offloads else self.ranks.device)
        return self._transformer

    def describe(self) -> TransformerPart:
        """Describe this rank's part of the transformer anew: who reads or quantizes a description uses it up."""
        mesh, options = self.ranks.mesh, self.config.pipeline
        return describe_transformer(
            self.adapter,
            options.path,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            tp_group=self.ranks.tp_device_group,
            layout=self.config.ranks.layout,
            dtype=self.adapter.dtype(options),
            brought=Brought.of(options),
        )

    @property
    def pipeline(self) -> Any:
        """Return the pipeline around the transformer, without text encoders, loading its parts the first time."""
        if self._pipeline is None:
            self._pipeline = self._load_pipeline(self.adapter.dtype(self.config.pipeline))
        return self._pipeline

    def load_exact_pipeline(self) -> Any:
        """Return the same pipeline, loaded anew, with everything but the transformer in float32."""
        self.drop_pipeline()
        self._pipeline = self._load_pipeline(torch.float32)
        return self._pipeline

    def _load_pipeline(self, dtype: torch.dtype) -> Any:
        return load_pipeline(
            self.adapter,
            self.config.pipeline,
            self.transformer.model,
            self.ranks.device,
            dtype,
            cpu_offload=self.offloads,
        )

    def approximating(self) -> AbstractContextManager[Any]:
        """Return a context in which the pipeline may approximate steps, if the options say so."""
        return nullcontext() if self.config.pipeline.approximation is None else self.adapter.approximate(self.pipeline)

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which the transformer alone runs on this rank's device, block by block if it offloads."""
        if not self.offloads:
            return nullcontext()
        return run_block_by_block(self.transformer.model, self.ranks.device)

    def embeddings_of(self, prompts: Prompts) -> Embeddings:
        """Return the embeddings of a batch of prompts, on this rank's device."""
        return {name: tensor.to(self.ranks.device) for name, tensor in self.embeddings[prompts].items()}

    def drop_pipeline(self) -> None:
        """Free the VAE and with it what the pipeline left on the device; the transformer stays."""
        if self._pipeline is not None:
            release_pipeline(self._pipeline)
            self._pipeline = None
            release_memory(self.ranks.device)

    def drop(self) -> None:
        """Free the whole model."""
        self.drop_pipeline()
        self._transformer = None
        release_memory(self.ranks.device)
