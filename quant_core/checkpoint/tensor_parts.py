"""Tensors on the disk: one safetensors file, or parts of bounded size with an index.

Parts have the usual form of the Hugging Face hub, `<stem>-00001-of-00003.safetensors` beside
`<stem>.safetensors.index.json`, whose `weight_map` says for each tensor in which part it is. Tensors fill the parts
in their order; one that is larger than a part gets a part for itself.

Writing replaces whatever form was there before, so that no reader finds the old tensors under the new description:
first the old index goes, then the files are published, then what the new form does not use is removed.

Reading opens the headers only; a tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.checkpoint.json_file import MISSING, read_object
from quant_core.checkpoint.tensor_file import DTYPES, TensorFile, WrittenDigests
from quant_core.errors import InputError, VerificationError
from quant_core.readable_file import require_readable

GB = 10**9
# The dtype of codes, which are in front in a file.
CODES = torch.int8


# An open file keeps in memory what was read of it, so after so much it is opened anew.
_MAPPED_BYTES = 2**28
_ADVICE = "quantize again, or copy it again"


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def index_path(path: Path) -> Path:
    """Return where the index lies of parts that stand for the file `path`."""
    return path.with_name(f"{path.name}.index.json")


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    part_bytes: float | None = None,
    digests: WrittenDigests | None = None,
) -> Path:
    """Publish the tensors as the file `path`, or as parts of at most `part_bytes` when they do not fit in one.

    The tensors may be on any device and in any layout, and may share memory: each is copied to the host alone, when it
    is its turn. digests: takes those of the tensors, and of the file, if it is one. Returns the file's path, or the
    index's; warns when there are parts.
    """
    parts = split(tensors, part_bytes)
    index_path(path).unlink(missing_ok=True)
    files = [path] if len(parts) == 1 else _part_paths(path, len(parts))
    for file, names in zip(files, parts):
        _write_one(file, {name: tensors[name] for name in names}, metadata, digests)
    if digests is not None and len(parts) > 1:
        digests.file = None
    if len(parts) > 1:
        _write_index(path, files, parts, tensors)
    for stale in _other_forms(path, files):
        stale.unlink(missing_ok=True)
    return path if len(parts) == 1 else index_path(path)


def split(tensors: Mapping[str, Tensor], part_bytes: float | None) -> list[list[str]]:
    """Return the names of the tensors of each part, in order; one part at least, none larger than need be."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if part_bytes is not None and parts[-1] and filled + tensor.nbytes > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += tensor.nbytes
    return parts


class TensorFiles:
    """Read tensors from one safetensors file or from the parts of an index, each when it is asked for.

    Raises InputError when a file is missing or damaged, and VerificationError when parts and index disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: Mapping[Path, set[str] | None] = (
            read_index(path) if path.name.endswith(".index.json") else {path: None}
        )
        self._open = {file: open_safetensors(file) for file in self._parts}
        self._mapped = 0
        self._home = self._one_home()

    @property
    def metadata(self) -> dict[str, str]:
        """Return the strings in the header, which are the same in all parts."""
        found = [dict(file.metadata() or {}) for file in self._open.values()]
        if any(other != found[0] for other in found):
            raise _mixed(self.path, "the headers of its parts differ")
        return found[0]

    def infos(self) -> dict[str, TensorInfo]:
        """Return dtype and shape of every tensor, reading headers only."""
        return {name: self._info(name) for name in self._home}

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the host, owning its memory: a mapped one would change when the file does."""
        file = self._home[name]
        try:
            tensor = self._open[file].get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise damaged(file, f"tensor {name}: {error}") from None
        self._mapped += tensor.nbytes
        if self._mapped > _MAPPED_BYTES:
            self._open, self._mapped = {path: open_safetensors(path) for path in self._open}, 0
        return tensor

    def _info(self, name: str) -> TensorInfo:
        view = self._open[self._home[name]].get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise VerificationError(
                f"the tensor '{name}' has a type that nobody here writes",
                where=str(self._home[name]),
                why=view.get_dtype(),
                advice="quantize again",
            )
        return TensorInfo(DTYPES[view.get_dtype()], tuple(view.get_shape()))

    def _one_home(self) -> dict[str, Path]:
        """Return the file of each tensor, and check that parts and index agree to the last name."""
        home: dict[str, Path] = {}
        for file, promised in self._parts.items():
            names = set(self._open[file].keys())
            if promised is not None and names != promised:
                raise _mixed(self.path, f"'{min(names ^ promised)}' is not where it says, in {file.name}")
            home |= dict.fromkeys(sorted(names), file)
        return home


def read_index(path: Path) -> dict[Path, set[str]]:
    """Return the part files that an index names, beside it, each with the tensors it is said to hold.

    Raises InputError when it is unreadable and VerificationError when it names anything but its neighbours.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _mixed(path, "it has no weight_map")
    parts: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        # An index may be a stranger's: it may name its neighbours only.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise _mixed(path, f"'{name}' lies in {file!r}, which is no safetensors file beside it")
        parts.setdefault(path.parent / file, set()).add(name)
    return parts


def open_safetensors(file: Path, *, advice: str = _ADVICE) -> Any:
    """Open a safetensors file; raises InputError, with the advice, when it is missing, damaged or cannot be opened."""
    require_readable(file, kind=".safetensors", missing=MISSING)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise damaged(file, str(error), advice) from None


def _write_one(
    file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str], digests: WrittenDigests | None
) -> None:
    """Publish one file; the library would put the metadata in another order each time, so the bytes would differ."""

    def write(temporary: Path) -> None:
        with TensorFile(temporary, tensors, metadata, in_front=CODES, digests=digests) as opened:
            for name in opened.names:
                opened.write(name, tensors[name])

    write_atomically(file, write)


def _write_index(path: Path, files: list[Path], parts: list[list[str]], tensors: Mapping[str, Tensor]) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file.name for file, names in zip(files, parts) for name in names},
    }
    write_text_atomically(index_path(path), json.dumps(index, indent=2) + "\n")
    warnings.warn(
        f"{path.name} is split into {len(files)} parts with an index; MindIE-SD reads one file only, so it cannot "
        "load this checkpoint (leave part_file_size out for it)",
        stacklevel=2,
    )


def _part_paths(path: Path, count: int) -> list[Path]:
    return [path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]


def _other_forms(path: Path, files: list[Path]) -> list[Path]:
    """Return what an earlier write under the same name left and this one does not use."""
    part = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    return [p for p in path.parent.iterdir() if (p == path or part.fullmatch(p.name)) and p not in files]


def damaged(file: Path, why: str, advice: str = _ADVICE) -> InputError:
    """Return the error that says that a file is no sound safetensors file; advice: how to come by one."""
    return InputError(
        f"{file.name} cannot be read as safetensors",
        where=str(file),
        why=why,
        advice=f"it is truncated or damaged: {advice}",
    )


def _mixed(index: Path, why: str) -> VerificationError:
    return VerificationError(
        "the index does not fit its parts",
        where=str(index),
        why=why,
        advice="the parts of two writes are mixed, or one was copied badly: quantize again, or copy all again",
    )
