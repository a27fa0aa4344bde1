"""Write a trained pipeline as a complete folder that the stock diffusers pipeline loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors.torch import load_file, save_file

from scripts.new_folder import new_folder
from scripts.tiny_tokenizers import write_json
from scripts.tiny_training.recipe import Recipe


def export_pipeline(recipe: Recipe, models: Mapping[str, Any], tokenizers: Path, folder: Path) -> Path:
    """Write the models in the recipe's dtype, the tokenizers and the configurations; all appear at once or not at all.

    `models`: every trained component and the VAE by its name. `folder` is new or empty. Returns its path.
    """
    with new_folder(folder) as whole:
        for name, (_, class_name) in recipe.components.items():
            if name in models:
                _save_model(models[name].to(recipe.dtype), whole / name)
            elif name == "scheduler":
                write_json(whole / name / "scheduler_config.json", _named(class_name) | dict(recipe.scheduler))
            else:
                shutil.copytree(tokenizers / name, whole / name)
        write_json(whole / "model_index.json", _named(recipe.pipeline) | dict(recipe.components))
    return folder


def _save_model(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if isinstance(model, transformers.CLIPTextModel):  # transformers before 5 reads the names of the real repositories
        file, prefix = folder / "model.safetensors", "text_model."
        tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def _named(class_name: str) -> dict[str, object]:
    return {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
