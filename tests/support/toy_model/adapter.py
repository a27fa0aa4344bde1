"""The toy model as the launcher sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_adapters.adapter import Embeddings, ModelAdapter, ResultFormat
from model_adapters.pipeline.step_index import step_index
from tests.support.toy_model.inputs import transformer_inputs
from tests.support.toy_model.options import ToyOptions
from tests.support.toy_model.pipeline import TOKENS
from tests.support.toy_model.recipes import DISABLED_LAYERS
from tests.support.toy_model.shard_plan import SHARD_PLANS
from tests.support.toy_model.structure import STRUCTURE


def encode(pipeline: Any, prompts: list[str], options: ToyOptions) -> Embeddings:
    """Turn each prompt's first letters into numbers between -1 and 1; there is no text encoder."""
    letters = torch.tensor([[*prompt.encode()[:TOKENS].ljust(TOKENS)] for prompt in prompts])
    numbers = (letters / 128 - 1).unsqueeze(-1).expand(-1, -1, pipeline.transformer.config.text_dim)
    return {"prompt_embeds": numbers}


def generate(
    pipeline: Any, embeddings: Embeddings, options: ToyOptions, generators: Any, *, decodes: bool = True
) -> Sequence[Any]:
    """Return a signal (length, channels) for each prompt."""
    return pipeline(**embeddings, length=options.length, num_inference_steps=options.infer_steps, generators=generators)


def save(signal: torch.Tensor, path: Path) -> None:
    """Write a signal as numpy's."""
    with path.open("wb") as file:
        np.save(file, signal.float().numpy())


ADAPTER = ModelAdapter(
    name="toy",
    options=ToyOptions,
    library="tests.support.toy_model.pipeline",
    transformer_class="ToyTransformer",
    pipeline_class="ToyPipeline",
    default_dtype="bfloat16",
    shard_plans=SHARD_PLANS,
    structure=STRUCTURE,
    disabled_layers=DISABLED_LAYERS,
    encode=encode,
    generate=generate,
    step_index=step_index,
    result=ResultFormat(".npy", save),
    transformer_inputs=transformer_inputs,
)
