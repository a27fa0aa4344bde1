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
# Options that no picture depends on, or that the card holds elsewhere: prompts and seeds stand at the pictures, and the
# fingerprint knows the files by their content.
_LEFT_OUT = frozenset(
    {
        "path",
        "transformer",
        "lora",
        "prompt_path",
        "prompt_type",
        "num_images_per_prompt",
        "max_num_prompt",
        "info_file_save_path",
        "data_split_num",
        "data_split_id",
        "device_type",
        "dtype",
        "use_cache",
    }
)


def origin_of(
    adapter: ModelAdapter, options: PipelineOptions, *, quant_type: str, fingerprint: str, checkpoint: str
) -> Origin:
    """Describe an evaluation; fingerprint: of the job that made the checkpoint; checkpoint: digest of its files."""
    dtype = adapter.dtype(options)
    chosen = options.model_dump(mode="json", exclude=set(_LEFT_OUT))
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
