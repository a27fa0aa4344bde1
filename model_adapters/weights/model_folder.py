"""Find the files of a diffusers pipeline folder and read their headers, and explain a folder that is not whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.tensor_parts import damaged, open_safetensors, read_index
from quant_core.errors import InputError, VerificationError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
# Which parts a pipeline has, and of which classes.
PARTS_NAME = "model_index.json"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

# How to come by a sound copy of a file that somebody published.
_ADVICE = "copy or download it again, and compare its size and checksum"

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
    if not path.exists():
        raise _incomplete(path)
    return read_object(path, advice=_ADVICE)


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
    file = open_safetensors(path, advice=_ADVICE)
    try:
        with file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged_weights(path, str(error)) from error


def damaged_weights(path: Path, why: str) -> InputError:
    """Return the error that says that a weight file of a model is no sound one."""
    return damaged(path, why, _ADVICE)


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    try:
        files = sorted(read_index(index))
    except VerificationError as error:  # there it is a bad result, here it is bad input
        raise InputError(
            f"{INDEX_NAME} names no weight files", where=str(index), why=error.why, advice=_ADVICE
        ) from None
    for file in files:
        if not file.is_file():
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
