"""A tiny pipeline, a checkpoint of it, and its evaluation: what the tests of quality share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model_adapters import load_adapter, load_options
from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.pipeline.arithmetic import other_dtype
from model_adapters.pipeline.prompt_encoding import encode_prompts
from model_adapters.pipeline.prompts import Batch, read_batches
from model_adapters.quality.card import Origin, QualityCard
from model_adapters.quality.evaluate import evaluate, published
from model_adapters.quality.measured import Measured, card_of
from model_adapters.quality.painting import Painting
from model_adapters.quality.store import FLOAT, FLOOR, QUANTIZED, PictureStore
from model_adapters.weights.loading import load_pipeline, load_transformer
from quant_core import (
    DumperManager,
    SaveProcessorConfig,
    SessionConfig,
    quant_model,
)
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.schemes import SCHEMES

SIDE, STEPS, PROMPTS = 64, 3, 2


@dataclass(frozen=True)
class Subject:
    """A float pipeline on disk, its encoded prompts, and a quantized checkpoint of its transformer."""

    adapter: ModelAdapter
    options: PipelineOptions
    scheme: str
    batches: list[Batch]
    embeddings: dict[tuple[str, ...], Embeddings]
    files: CheckpointFiles

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that was quantized."""
        return self.adapter.dtype(self.options)

    def transformer(self) -> nn.Module:
        """Load the float transformer anew."""
        return load_transformer(self.adapter, self.options.path, dtype=self.dtype, device="cpu").model

    def pipeline(self) -> Any:
        """Load the pipeline around a new float transformer, in float32."""
        return load_pipeline(self.adapter, self.options, self.transformer(), "cpu", torch.float32)

    def painting(self, folder: Path, batches: Sequence[Batch] | None = None, **changes: Any) -> Painting:
        """Describe the painting of all batches, or of a share."""
        return Painting(
            self.adapter,
            self.options,
            self.dtype,
            self.batches if batches is None else batches,
            self.embeddings_of,
            PictureStore(folder, {FLOAT: "float", FLOOR: "float", QUANTIZED: self.scheme}, self.options.seed),
            **changes,
        )

    def embeddings_of(self, batch: Batch) -> Embeddings:
        """Return a batch's embeddings."""
        return self.embeddings[tuple(request.prompt for request in batch)]

    def evaluate(self, folder: Path, batches: Sequence[Batch] | None = None, **changes: Any) -> Measured:
        """Evaluate with a fresh float pipeline."""
        return evaluate(self.painting(folder, batches, **changes), self.pipeline(), published(self.files))

    def card(self, *parts: Measured) -> QualityCard:
        """Make the card of what ranks measured."""
        origin = Origin(
            model=self.adapter.name,
            quant_type=self.scheme,
            fingerprint="0" * 64,
            options={"width": SIDE, "height": SIDE, "infer_steps": STEPS},
            dtype=str(self.dtype).removeprefix("torch."),
            floor_dtype=str(other_dtype(self.dtype)).removeprefix("torch."),
        )
        return card_of(parts, origin)

    def with_files(self, files: CheckpointFiles) -> Subject:
        """Return the same with other published files."""
        return replace(self, files=files)


def options_of(kind: str, path: Path, prompt_file: Path) -> PipelineOptions:
    """Ask for a few small pictures in a few steps."""
    return load_options(kind).OPTIONS(
        path=str(path),
        prompt_path=str(prompt_file),
        width=SIDE,
        height=SIDE,
        infer_steps=STEPS,
        max_num_prompt=PROMPTS,
    )


def encoded(adapter: ModelAdapter, options: PipelineOptions) -> tuple[list[Batch], dict[tuple[str, ...], Embeddings]]:
    """Return the batches, and the embeddings of each."""
    batches = read_batches(options)
    prompts = [tuple(request.prompt for request in batch) for batch in batches]
    return batches, encode_prompts(adapter, options, prompts, "cpu", adapter.dtype(options))


def make_subject(kind: str, path: Path, prompt_file: Path, scheme: str, folder: Path) -> Subject:
    """Quantize a tiny pipeline's transformer, calibrated on the prompts with other seeds, into a folder."""
    adapter, options = load_adapter(kind), options_of(kind, path, prompt_file)
    dtype = adapter.dtype(options)
    batches, embeddings = encoded(adapter, options)
    transformer = load_transformer(adapter, str(path), dtype=dtype, device="cpu").model
    pipeline = load_pipeline(adapter, options, transformer, "cpu", dtype)
    dumper = DumperManager(transformer, "timestep", step_source=lambda: adapter.step_index(pipeline))
    for number, encodings in enumerate(embeddings.values()):
        adapter.generate(pipeline, encodings, options, torch.Generator().manual_seed(10_000 + number))
    dumper.close()
    processors = {
        scheme: SCHEMES[scheme].config(disable_names=adapter.disabled_layers[scheme]),
        "save": SaveProcessorConfig(output_path=str(folder)),
    }
    config = SessionConfig(processor_cfg_map=processors, calib_data=dumper.records)
    result = quant_model(transformer, config, structure=adapter.structure)
    assert result.files is not None
    return Subject(adapter, options, scheme, batches, embeddings, result.files)


def with_wrong_scale(files: CheckpointFiles, layer: str, folder: Path) -> CheckpointFiles:
    """Copy a checkpoint and double one layer's scale in it, which every rule of the contract allows."""
    folder.mkdir()
    with safe_open(files.weights, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = f"{layer}.weight_scale"
    if f"{layer}.deq_scale" in tensors:
        # Of a static layer: float32 in the low half of an int64.
        name = f"{layer}.deq_scale"
        bits = tensors[name].to(torch.int32).view(torch.float32) * 2
        tensors[name] = bits.view(torch.int32).to(torch.int64)
    else:
        tensors[name] = tensors[name] * 2
    weights, description = folder / files.weights.name, folder / files.description.name
    save_file(tensors, weights, metadata=metadata)
    description.write_bytes(files.description.read_bytes())
    for path in (weights, description):
        path.chmod(0o640)
    return CheckpointFiles(weights, description)
