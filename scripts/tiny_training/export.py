"""Write a trained pipeline as a complete folder that the stock diffusers pipeline loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from quant_core.errors import InputError
from scripts.tiny_tokenizers import write_json
from scripts.tiny_training.recipe import Recipe


def require_new(folder: Path) -> None:
    """Raise InputError if `folder` holds something: training takes long, so this is asked before and not after it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{folder} already holds something",
            where="folder of the tiny pipeline",
            why="files of two pipelines must not mix, and nothing of yours is deleted",
            advice="name a new folder, or remove this one",
        )


def export_pipeline(recipe: Recipe, models: Mapping[str, Any], tokenizers: Path, folder: Path) -> Path:
    """Write the models in the recipe's dtype, the tokenizers and the configurations; all appear at once or not at all.

    `models`: every trained component and the VAE by its name. `folder` is new or empty. Returns its path.
    """
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as unfinished:
        whole = Path(unfinished, "pipeline")
        whole.mkdir(mode=0o755)
        for name, (_, class_name) in recipe.components.items():
            if name in models:
                models[name].to(recipe.dtype).save_pretrained(whole / name)
            elif name == "scheduler":
                write_json(whole / name / "scheduler_config.json", _named(class_name) | dict(recipe.scheduler))
            else:
                shutil.copytree(tokenizers / name, whole / name)
        write_json(whole / "model_index.json", _named(recipe.pipeline) | dict(recipe.components))
        whole.rename(folder)
    return folder


def _named(class_name: str) -> dict[str, object]:
    return {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
