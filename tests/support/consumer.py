"""Read a published folder by the rules of the runtime that loads it, written down here a second time on purpose."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint

QUANTIZED = {"W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16"}
STATIC = {"W8A8", "W8A8_TIMESTEP"}


@dataclass(frozen=True)
class Loaded:
    """One rank's checkpoint as the runtime sees it."""

    description: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def quantized_layers(self) -> list[str]:
        return [
            n.removesuffix(".weight") for n, t in self.description.items() if n.endswith(".weight") and t in QUANTIZED
        ]


def load(folder: Path, rank: int | None, scheme: str) -> Loaded:
    """Load the description that a program names, and the weights whose name follows from its type."""
    suffix = "" if rank is None else f"_{rank}"
    description_path = folder / f"quant_model_description_{scheme}{suffix}.json"
    description = json.loads(description_path.read_text())
    weights = folder / f"quant_model_weight_{description['model_quant_type'].lower()}{suffix}.safetensors"
    for path in (description_path, weights):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode), "the loader refuses links"
        assert not mode & 0o777 & ~0o640, "the loader refuses wider modes"
    assert list(Checkpoint(CheckpointFiles(weights, description_path)).findings()) == [], "the product's own reader"
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Loaded(description, tensors)


def check(loaded: Loaded, dtype: torch.dtype, timesteps: int | None = None) -> None:
    """Check types, dtypes, shapes and ranges of everything the runtime would load."""
    kind = loaded.description["model_quant_type"]
    names = [name for name in loaded.description if name not in ("model_quant_type", "fa_quant_type")]
    assert next(iter(loaded.description)) == "model_quant_type"
    assert sorted(names) == sorted(loaded.tensors), "description and tensors are not one to one"
    rows = () if timesteps is None else (timesteps,)
    deq = (torch.float32,) if dtype == torch.bfloat16 else (torch.int64,)
    assert loaded.quantized_layers
    for layer in loaded.quantized_layers:
        weight = loaded.tensors[f"{layer}.weight"]
        out = weight.shape[0]
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "weight": (torch.int8, tuple(weight.shape)),
            "weight_scale": (dtype, (out, 1)),
            "weight_offset": (dtype, (out, 1)),
        }
        if kind in STATIC:
            expected |= {
                "input_scale": (dtype, (*rows, 1)),
                "input_offset": (dtype, (*rows, 1)),
                "quant_bias": (torch.int32, (*rows, out)),
                "deq_scale": (deq[0], (*rows, out)),
            }
        found = {
            name.removeprefix(f"{layer}."): (tensor.dtype, tuple(tensor.shape))
            for name, tensor in loaded.tensors.items()
            if name.startswith(f"{layer}.") and "." not in name.removeprefix(f"{layer}.")
        }
        bias = found.pop("bias", None)
        assert bias in (None, (dtype, (out,)))
        assert found == expected, layer
        assert weight.abs().max() <= 127
        assert (loaded.tensors[f"{layer}.weight_scale"] > 0).all()
        if kind in STATIC:
            offset = loaded.tensors[f"{layer}.input_offset"].float()
            assert ((offset == offset.round()) & (offset >= -128) & (offset <= 127)).all()
            assert (loaded.tensors[f"{layer}.input_scale"] > 0).all()


def check_manifest(folder: Path) -> dict[str, Any]:
    """Check that the manifest vouches for the files beside it, and return it."""
    manifest = json.loads((folder / "quant_manifest.json").read_text())
    for file in manifest["files"]:
        content = (folder / file["name"]).read_bytes()
        assert len(content) == file["bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    return manifest
