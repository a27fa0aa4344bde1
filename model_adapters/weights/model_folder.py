"""Find the files of a diffusers pipeline folder and read their headers, and explain a folder that is not whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from quant_core.errors import InputError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def pipeline_folder(path: str) -> Path:
    """Return the folder of a pipeline; a hub id (`owner/name` that is no path here) is fetched into the hub's cache.

    Raises InputError for a path that is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"'{path}' is a file, not a model folder", where=path, advice="give the folder it lies in")
    if is_hub_id(path):
        return _download(path)
    raise InputError(
        f"there is no model folder '{path}'",
        where=str(folder.absolute()),
        why="the path does not exist on this machine",
        advice="check the path, and that it is mounted on this node",
    )


def is_hub_id(path: str) -> bool:
    """Tell whether a path has the form of a hub id, `owner/name`, and its first part is no folder here."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().parent.exists()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises InputError when it is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _incomplete(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__} where an object belongs")
    return content


def check_class(path: Path, config: dict[str, Any], expected: str) -> None:
    """Check that a configuration read from `path` is one of diffusers' class `expected`; raises InputError."""
    found = config.get("_class_name")
    if found != expected:
        raise InputError(
            f"{path.parent.name}/ is a {found}, not a {expected}",
            where=str(path),
            why="the files are of another model than the one that was asked for",
            advice=f"choose the model that goes with {found}, or another folder",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder in the order to read them: those of the index, else the one.

    Raises InputError when there is none, or when the index names a file that is missing.
    """
    if (folder / INDEX_NAME).exists():
        return _indexed_files(folder)
    single = folder / WEIGHTS_NAME
    if single.is_file():
        return [single]
    others = ", ".join(sorted(found.name for found in folder.glob("*.*") if found.name != "config.json")) or "nothing"
    raise InputError(
        f"{folder.name}/ has no weights",
        where=str(folder),
        why=f"neither {WEIGHTS_NAME} nor {INDEX_NAME} is there, but {others}",
        advice="save the model with save_pretrained(..., safe_serialization=True), without a variant",
    )


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading slices; raises InputError when it is truncated, corrupt or unreadable."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path.name} cannot be read",
            where=str(path),
            why=f"{error} (a truncated copy or another kind of file)",
            advice="copy or download the file again and compare its size and checksum",
        ) from error


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _unreadable(index, "its weight_map is not an object from tensor names to file names")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        # A name with a folder in it could reach any file of the machine.
        if file.parent != folder or not file.is_file():
            raise _incomplete(file, f"{INDEX_NAME} names it")
    return files


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"'{hub_id}' is neither a folder here nor a model the hub gives out",
            where=str(Path(hub_id).absolute()),
            why=str(error).partition("\n")[0],
            advice="check the path; for a hub id check the network, the login and the model's licence",
        ) from error


def _incomplete(path: Path, reason: str = "a diffusers pipeline folder has it") -> InputError:
    return InputError(
        f"{path.parent.name}/{path.name} is missing",
        where=str(path),
        why=reason,
        advice="give the folder that holds model_index.json, and check that its copy is complete",
    )


def _unreadable(path: Path, reason: object) -> InputError:
    return InputError(
        f"{path.name} cannot be read",
        where=str(path),
        why=str(reason),
        advice="copy or download the file again",
    )
