"""Make a pipeline whose transformer has a real model's dimensions and random weights, streaming it to disk.

    python scripts/make_full_size_pipeline.py flux demo/flux-full      FLUX.1-dev: 11.9 billion parameters, 23.8 GB
    python scripts/make_full_size_pipeline.py sd3 demo/sd3-full        SD3-medium: 2 billion parameters, 4.2 GB

Whoever wants to know what a job costs in time and memory needs these dimensions and not these weights. Memory stays at
one block of rows; --blocks makes a shorter model of the same width where the disk is small. Files are laid out as the
published ones: FLUX.1-dev in three files with an index, SD3-medium in one.

Around the transformer stand the tiny parts of `make_tiny_pipeline.py`: a VAE with its number of channels, and text
encoders of two layers that put out features of the real widths. So the real pipeline runs on the folder and
calibrates, and nearly all of its time and memory are the transformer's, which is what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from launcher.inspection.room import require_room
from model_adapters import load_adapter
from model_adapters.weights.model_folder import INDEX_NAME, WEIGHTS_NAME
from model_adapters.weights.transformer_part import build_empty
from quant_core.atomic_file import make_folder, write_atomically, write_text_atomically
from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.errors import ExplainedError
from scripts.make_tiny_pipeline import DTYPES, RECIPES, write_components
from scripts.new_folder import new_folder

# The published configurations of the transformers.
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}


@dataclass(frozen=True)
class Kind:
    """Say how a real model differs from the tiny one: its transformer, and the names its depth has there.

    text_widths: features of each text encoder, made of the transformer's configuration.
    """

    config: Mapping[str, Any]
    depth: tuple[str, ...]
    text_widths: Callable[[Mapping[str, Any]], dict[str, int]]


def _flux_text(config: Mapping[str, Any]) -> dict[str, int]:
    return {"text_encoder": config["pooled_projection_dim"], "text_encoder_2": config["joint_attention_dim"]}


def _sd3_text(config: Mapping[str, Any]) -> dict[str, int]:
    # The two CLIPs share the pooled vector as 768 and 1280 share 2048.
    pooled = config["pooled_projection_dim"] // 8
    return {"text_encoder": 3 * pooled, "text_encoder_2": 5 * pooled, "text_encoder_3": config["joint_attention_dim"]}


KINDS = {
    "flux": Kind(FLUX, ("num_layers", "num_single_layers"), _flux_text),
    "sd3": Kind(SD3, ("num_layers",), _sd3_text),
}
# The size of the real model's files, in bytes.
FILE_SIZE = 10**10
# Numbers that are drawn at once.
BLOCK_NUMEL = 2**24


def make_full_size(
    folder: Path, config: Mapping[str, Any] = FLUX, seed: int = 0, file_size: int = FILE_SIZE, kind: str = "flux"
) -> Path:
    """Write a pipeline of that kind with a transformer of that configuration; returns the folder.

    It appears whole or not at all. Raises EnvironmentFailure when the disk is too small, InputError for a folder that
    holds something.
    """
    recipe = replace(RECIPES[kind], text_widths=KINDS[kind].text_widths(config))
    with new_folder(folder, mode=0o750) as whole:
        transformer = make_folder(whole / "transformer")
        write_components(recipe, whole, seed, DTYPES[recipe.dtype], "10GB", leave_out=["transformer"])
        write_text_atomically(transformer / "config.json", json.dumps(dict(config), indent=2) + "\n")
        model = build_empty(load_adapter(kind), transformer)
        tensors = {name: _described(tensor, DTYPES[recipe.dtype]) for name, tensor in model.state_dict().items()}
        require_room({whole: _size(tensors)})
        _write_files(transformer, _share_out(tensors, file_size), torch.Generator().manual_seed(seed))
    return folder


def _described(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("meta", dtype if tensor.is_floating_point() else tensor.dtype)


def _write_files(folder: Path, files: Sequence[Mapping[str, Tensor]], generator: torch.Generator) -> None:
    """Write the transformer as one file, or as several and their index."""
    home: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else WEIGHTS_NAME
        write_atomically(folder / name, lambda temporary, part=part: _write(temporary, part, generator))
        home |= dict.fromkeys(part, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_size, files))}, "weight_map": home}
        write_text_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _write(path: Path, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
    with TensorFile(path, tensors, {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                file.write(name, (noise if name.endswith("bias") else 1 + noise).to(tensor.dtype))
                continue
            columns = math.prod(tensor.shape[1:])
            rows = max(1, BLOCK_NUMEL // columns)
            for first in range(0, tensor.shape[0], rows):
                shape = (min(rows, tensor.shape[0] - first), *tensor.shape[1:])
                # Variance 1 / fan_in: a signal would keep its size.
                block = torch.randn(shape, generator=generator) * columns**-0.5
                file.write_rows(name, block.to(tensor.dtype), first)


def _share_out(tensors: Mapping[str, Tensor], file_size: int) -> list[dict[str, Tensor]]:
    """Put the tensors, in order, into files of at most that size."""
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and _size(files[-1]) + _size({name: tensor}) > file_size:
            files.append({})
        files[-1][name] = tensor
    return files


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS, help="whose dimensions")
    parser.add_argument("folder", type=Path, metavar="OUT", help="new folder of the pipeline")
    parser.add_argument("--blocks", type=int, help="transformer blocks of each sort (default: as the real model)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    asked = parser.parse_args(arguments)
    kind = KINDS[asked.kind]
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = {**kind.config, **(dict.fromkeys(kind.depth, asked.blocks) if asked.blocks else {})}
    try:
        print(f"pipeline  {make_full_size(asked.folder, config, asked.seed, kind=asked.kind)}")
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
