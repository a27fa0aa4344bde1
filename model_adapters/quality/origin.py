"""Say in a card what was measured, and with what."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from model_adapters.adapter import ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.pipeline.arithmetic import other_dtype
from model_adapters.quality.card import Origin

# Packages whose version may move a figure.
_PACKAGES = ("dit-quant-launcher", "torch", "diffusers", "transformers")
# What tells jobs apart and no picture: prompts and seeds stand at the pictures themselves.
_AT_THE_PICTURES = frozenset({"num_images_per_prompt", "data_split_num", "data_split_id"})


def origin_of(
    adapter: ModelAdapter, options: PipelineOptions, *, quant_type: str, fingerprint: str, checkpoint: str
) -> Origin:
    """Describe an evaluation; fingerprint: of the job that made the checkpoint; checkpoint: digest of its files."""
    dtype = adapter.dtype(options)
    chosen = options.model_dump(mode="json", exclude={*options.OUTSIDE_IDENTITY, *_AT_THE_PICTURES})
    return Origin(
        model=adapter.name,
        quant_type=quant_type,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
        options=dict(sorted(chosen.items())),
        dtype=_name(dtype),
        floor_dtype=_name(other_dtype(dtype)),
        versions={package: _version(package) for package in _PACKAGES},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
