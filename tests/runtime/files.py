"""Change published files, or make one of several, as the runtime demands them: one file, mode 0640."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runtime.product import CheckpointFiles, files_in

# What is done to a checkpoint's tensors, in place.
Change = Callable[[dict[str, Tensor]], object]
# What the loader takes for a wide mode: any bit that is not in this one.
_MODE = 0o640


def changed_copy(published: CheckpointFiles, folder: Path, change: Change) -> Path:
    """Copy a checkpoint into a folder with changed tensors, and return its description."""
    tensors = load_file(published.weights)
    change(tensors)
    description = json.loads(published.description.read_text())
    with safe_open(published.weights, framework="pt") as file:
        metadata = file.metadata()
    return _write(folder, published, tensors, description, metadata)


def mixed(published: Mapping[str, CheckpointFiles], folder: Path) -> Path:
    """Make one checkpoint whose layers have all types in turn, and return its description.

    published: for each type the checkpoint to take layers of that type from, all of one model. One of type FLOAT has no
    tensors in the file.
    """
    descriptions = {kind: json.loads(files.description.read_text()) for kind, files in published.items()}
    tensors = {kind: load_file(files.weights) for kind, files in published.items()}
    order = [*published, "FLOAT"]
    merged: dict[str, Tensor] = {}
    description = {"model_quant_type": "W8A8"}
    for index, name in enumerate(_unsmoothed_layers(descriptions["W8A8_DYNAMIC"])):
        kind = order[index % len(order)]
        for key in [key for key in tensors.get(kind, ()) if key.startswith(f"{name}.")]:
            merged[key], description[key] = tensors[kind][key], descriptions[kind][key]
        if kind == "FLOAT":
            description[f"{name}.weight"] = "FLOAT"
    return _write(folder, files_in(folder, "W8A8"), merged, description, {})


def _unsmoothed_layers(description: Mapping[str, str]) -> list[str]:
    weights = [key for key, kind in description.items() if key.endswith(".weight") and kind == "W8A8_DYNAMIC"]
    return [key.removesuffix(".weight") for key in weights]


def _write(
    folder: Path,
    like: CheckpointFiles,
    tensors: dict[str, Tensor],
    description: Mapping[str, str],
    metadata: dict[str, str],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights, described = folder / like.weights.name, folder / like.description.name
    save_file(tensors, weights, metadata=metadata)
    described.write_text(json.dumps(description))
    for path in (weights, described):
        path.chmod(_MODE)
    return described
