"""Find the files of a diffusers pipeline folder and read their headers, and explain a folder that is not whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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

# Weights of a variant stand beside the usual ones, or alone: diffusion_pytorch_model.fp16.safetensors.
_VARIANT = re.compile(r"(?:diffusion_pytorch_model|model)\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors)")
_USUAL = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors(?:\.index\.json)?")
# A tokenizer's vocabulary is in one of these, or in some of them together.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def pipeline_folder(path: str, variant: str | None = None) -> Path:
    """Return the folder of a pipeline; a hub id (`owner/name` that is no path here) is fetched into the hub's cache.

    variant: whose weights are fetched, the usual ones when left out. Raises InputError for a path that is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"'{path}' is a file, not a model folder", where=path, advice="give the folder it lies in")
    if is_hub_id(path):
        return _download(path, variant)
    raise InputError(
        f"there is no model folder '{path}'",
        where=str(folder.absolute()),
        why="the path does not exist on this machine",
        advice="check the path, and that it is mounted on this node",
    )


def cached_folder(hub_id: str) -> Path | None:
    """Return what the hub's cache on this machine holds of a model, whole or not, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, PARTS_NAME)
    return Path(found).parent if isinstance(found, str) else None


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


def read_parts(root: Path) -> dict[str, list[str | None]]:
    """Return the library and class of each part of a pipeline; `[None, None]` for one that it goes without.

    Raises InputError for an index that is missing, damaged, or says it in another way.
    """
    index = root / PARTS_NAME
    content = read_json(index)
    if unclear := [name for name, kind in content.items() if kind is None]:
        raise InputError(
            f"{PARTS_NAME} says null for {', '.join(unclear)}",
            where=str(index),
            why="a part that the pipeline goes without is a pair of library and class, both null",
            advice=f'write "{unclear[0]}": [null, null]',
        )
    return {name: kind for name, kind in content.items() if isinstance(kind, list)}  # others are options


def check_tokenizers(root: Path) -> None:
    """Raise InputError for a tokenizer without a vocabulary: transformers makes an empty one, which knows no word.

    A folder that holds nothing but a transformer has no index of parts.
    """
    parts = read_parts(root) if (root / PARTS_NAME).exists() else {}
    for folder in [root / name for name, kind in parts.items() if name.startswith("tokenizer") and any(kind)]:
        if not any(all((folder / file).is_file() for file in files) for files in _VOCABULARIES):
            raise InputError(
                f"{folder.name}/ has no vocabulary",
                where=str(folder),
                why=f"{PARTS_NAME} names the tokenizer, and none of these is there: "
                + ", ".join(" with ".join(files) for files in _VOCABULARIES),
                advice="check that the copy of the model is complete",
            )


def variant_of_pipeline(root: Path, parts: Iterable[str]) -> str | None:
    """Return the variant (`fp16`) that some part to load has weights of and no usual ones; None if none has.

    Raises InputError where another part has both: diffusers would read the variant of that one too.
    """
    folders = [root / name for name in parts]
    variant = next((variant for folder in folders if (variant := variant_of(folder))), None)
    for folder in folders:
        if variant and not variant_of(folder) and _has_variant(folder, variant):
            raise InputError(
                f"{folder.name}/ has weights in two forms, the usual one and {variant}",
                where=str(folder),
                why=f"another part has only {variant}, and a variant is read of all parts that have it",
                advice=f"say --variant {variant}, or move the files away that are not meant",
            )
    return variant


def variant_of(folder: Path) -> str | None:
    """Return the variant that a model's folder has weights of; None where it has the usual ones, or none.

    Raises InputError when there are several to choose from.
    """
    names = [path.name for path in folder.glob("*")]
    if any(map(_USUAL.fullmatch, names)):
        return None
    found = sorted({match[1] or match[2] for name in names if (match := _VARIANT.fullmatch(name))})
    if len(found) > 1:
        raise InputError(
            f"{folder.name}/ has weights in several variants: {', '.join(found)}",
            where=str(folder),
            why="none of them has the usual names, so it is unclear which are meant",
            advice=f"say which, --variant {found[0]}, or give the files of one the names without it",
        )
    return found[0] if found else None


def _has_variant(folder: Path, variant: str) -> bool:
    found = (_VARIANT.fullmatch(path.name) for path in folder.glob("*"))
    return any(match is not None and variant in match.groups() for match in found)


def has_weights(folder: Path) -> bool:
    """Tell whether a diffusers model's folder holds weights, or an index of them."""
    return any(_USUAL.fullmatch(path.name) or _VARIANT.fullmatch(path.name) for path in folder.glob("*"))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files of a model folder in the order to read them: those of the index, else the one.

    variant: whose files; left out, or where only other parts of the pipeline have it, as in diffusers: the usual ones,
    or those of the only variant. Raises InputError when there is none, or when the index names a file that is missing.
    """
    if variant and not _has_variant(folder, variant) and any(_has_variant(p, variant) for p in folder.parent.glob("*")):
        variant = None
    index, single = _leading(folder, variant or variant_of(folder))
    if index.exists():
        return _indexed_files(index)
    if single.is_file():
        return [single]
    others = ", ".join(sorted(found.name for found in folder.glob("*.*") if found.name != "config.json")) or "nothing"
    raise InputError(
        f"{folder.name}/ has no weights{f' of the variant {variant}' if variant else ''}",
        where=str(folder),
        why=f"neither {single.name} nor {index.name} is there, but {others}",
        advice="leave --variant out, or give one that is there"
        if variant
        else "save the model with save_pretrained(..., safe_serialization=True)",
    )


def _leading(folder: Path, variant: str | None) -> tuple[Path, Path]:
    """Return where the index of a diffusers model's weights would be, and where the only file would, variant or not."""
    end = f".{variant}" if variant else ""
    index, single = INDEX_NAME.removesuffix(".json"), WEIGHTS_NAME.removesuffix(".safetensors")
    return folder / f"{index}{end}.json", folder / f"{single}{end}.safetensors"


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


def _indexed_files(index: Path) -> list[Path]:
    try:
        files = sorted(read_index(index))
    except VerificationError as error:  # there it is a bad result, here it is bad input
        raise InputError(
            f"{index.name} names no weight files", where=str(index), why=error.why, advice=_ADVICE
        ) from None
    for file in files:
        if not file.is_file():
            raise _incomplete(file, f"{index.name} names it")
    return files


def _download(hub_id: str, variant: str | None) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
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
