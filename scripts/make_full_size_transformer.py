"""Make a FLUX transformer of the real model's dimensions with random weights, streaming it to disk.

    python scripts/make_full_size_transformer.py demo/flux-full

FLUX.1-dev has 11.9 billion parameters: 22.2 GiB in bfloat16, in three files with an index. Whoever wants to know what
a job costs in time and memory needs these dimensions and not these weights. Memory stays at one block of rows;
--double_blocks and --single_blocks make a shorter model of the same width where the disk is small.

The folder holds the transformer and no text encoders, so it serves jobs that calibrate nothing
(`--quant_type w8a8_dynamic --calibrate needed`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from model_adapters import load_adapter
from model_adapters.weights.model_folder import INDEX_NAME
from model_adapters.weights.transformer_part import build_empty
from quant_core.atomic_file import make_folder, write_atomically, write_text_atomically
from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.errors import EnvironmentFailure, ExplainedError

# The published configuration of FLUX.1-dev's transformer.
CONFIG = {
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
# The size of the real model's files, in bytes.
FILE_SIZE = 10**10
# Numbers that are drawn at once.
BLOCK_NUMEL = 2**24


def make_full_size(folder: Path, config: Mapping[str, Any], seed: int = 0, file_size: int = FILE_SIZE) -> Path:
    """Write the transformer of that configuration below `folder`; returns the folder.

    Raises EnvironmentFailure when the disk is too small.
    """
    transformer = make_folder(folder / "transformer")
    write_text_atomically(folder / "model_index.json", json.dumps({"_class_name": "FluxPipeline"}, indent=2) + "\n")
    write_text_atomically(transformer / "config.json", json.dumps(dict(config), indent=2) + "\n")
    model = build_empty(load_adapter("flux"), transformer)
    tensors = {name: tensor.to("meta", torch.bfloat16) for name, tensor in model.state_dict().items()}
    _check_room(folder, tensors)
    generator = torch.Generator().manual_seed(seed)
    files = _share_out(tensors, file_size)
    home: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        path = transformer / f"diffusion_pytorch_model-{number:05}-of-{len(files):05}.safetensors"
        write_atomically(path, lambda temporary, part=part: _write(temporary, part, generator))
        home |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": _size(tensors)}, "weight_map": home}
    write_text_atomically(transformer / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return folder


def _write(path: Path, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
    with TensorFile(path, tensors, {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                file.write(name, torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
                continue
            rows = max(1, BLOCK_NUMEL // tensor.shape[1])
            for first in range(0, tensor.shape[0], rows):
                shape = (min(rows, tensor.shape[0] - first), tensor.shape[1])
                # Variance 1 / fan_in: a signal would keep its size.
                block = torch.randn(shape, generator=generator) * tensor.shape[1] ** -0.5
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


def _check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    needed, free = _size(tensors), shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFailure(
            "the disk is too small for the model",
            where=str(folder),
            why=f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            advice="use another disk, or fewer --double_blocks and --single_blocks",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a FLUX transformer of the real dimensions with random weights.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="new folder of the pipeline")
    parser.add_argument("--double_blocks", type=int, default=CONFIG["num_layers"], help="default 19, as FLUX.1-dev")
    parser.add_argument(
        "--single_blocks", type=int, default=CONFIG["num_single_layers"], help="default 38, as FLUX.1-dev"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    asked = parser.parse_args(arguments)
    config = CONFIG | {"num_layers": asked.double_blocks, "num_single_layers": asked.single_blocks}
    try:
        print(f"pipeline  {make_full_size(asked.folder, config, asked.seed)}")
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
