"""Write a checkpoint of the small model, and change what is on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import quant_model
from quant_core.checkpoint.entries import CheckpointFiles
from tests.support.small_model import SmallModel, session

# tensors by name and the description; changed in place
Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]


def written(folder: Path, scheme: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> CheckpointFiles:
    """Quantize the small model and save it in the folder."""
    files = quant_model(SmallModel(dtype), session(scheme, folder, dtype=dtype, **options)).files
    assert files is not None
    return files


def damaged(files: CheckpointFiles, change: Damage, *, metadata: dict[str, str] | None = None) -> CheckpointFiles:
    """Rewrite both files with a change."""
    tensors, description = load_file(files.weights), json.loads(files.description.read_text())
    with safe_open(files.weights, framework="pt") as old:
        header = metadata if metadata is not None else old.metadata()
    change(tensors, description)
    save_file(tensors, files.weights, metadata=header)
    files.description.write_text(json.dumps(description))
    return files


def add_smoothing(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Move `first` into a smoothed container, whose factor divides the weight's columns by 1, 2, 4, ..."""
    for name in [name for name in description if name.startswith("first.")]:
        moved = name.replace("first.", "first.linear.")
        description[moved], tensors[moved] = description.pop(name), tensors.pop(name)
    description["first.div.mul_scale"] = "FLOAT"
    tensors["first.div.mul_scale"] = 2.0 ** torch.arange(8, dtype=tensors["first.linear.weight_scale"].dtype)


def add_attention(tensors: dict[str, Tensor], description: dict[str, Any], heads: int = 4) -> None:
    """Add the scales of one attention."""
    description["fa_quant_type"] = "FAQuant"
    dtype = tensors["first.weight_scale"].dtype
    for part in "qkv":
        tensors[f"attn.fa_{part}.scale"] = torch.full((heads, 1), 0.5, dtype=dtype)
        tensors[f"attn.fa_{part}.offset"] = torch.zeros(heads, 1, dtype=torch.int8)
        description |= {f"attn.fa_{part}.{kind}": "FAQuant" for kind in ("scale", "offset")}


def both(first: Damage, second: Damage) -> Damage:
    """One change after another."""

    def damage(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        first(tensors, description)
        second(tensors, description)

    return damage
