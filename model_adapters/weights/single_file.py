"""Know a transformer in one safetensors file, in whatever format it was published, as if diffusers had saved it.

diffusers converts the published formats by renaming tensors and by cutting and joining them along their rows, and does
so with the whole model in memory. Here its conversion runs once on tensors of row numbers: what comes out says for each
row of a converted tensor which row of which tensor of the file it is. With that any slice is read from the file
directly, and nothing else is.

Worked example: the file's `qkv` has 6 rows, numbered 0 to 5. The conversion splits it into three, so `to_k` comes out
as rows 2 and 3: reading the second half of `to_k` reads row 3 of `qkv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from model_adapters.weights.stored_tensor import Header, JoinedTensor, Stored, StoredTensor, read_header
from quant_core.errors import InputError

# A row's number counts from here for each tensor of the file: no tensor has as many rows.
_STRIDE = 2**32


def converted_tensors(path: Path, transformer_class: str, expected: Mapping[str, object]) -> Mapping[str, Stored]:
    """Return where the tensors of a model lie in a file, by their names in diffusers; reads the header.

    A checkpoint of a whole pipeline holds other models too, of which nothing is asked. expected: the names of the
    model's tensors. Raises InputError when the format is none that diffusers converts.
    """
    header = read_header(path)
    if set(header.entries) == set(expected):
        return {name: header.stored(name) for name in header.entries}
    shapes = {name: entry["shape"] for name, entry in header.entries.items()}
    numbered = {
        name: (torch.arange(shape[0]) + index * _STRIDE).view(-1, *[1] * len(shape[1:]))
        for index, (name, shape) in enumerate(shapes.items())
        if shape
    }
    converted = _convert(numbered, path, transformer_class)
    return {name: _joined([*_runs(numbers.flatten(), header)]) for name, numbers in converted.items()}


def _convert(checkpoint: dict[str, Tensor], path: Path, transformer_class: str) -> Mapping[str, Tensor]:
    table = import_module("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
    try:
        return table[transformer_class]["checkpoint_mapping_fn"](checkpoint=checkpoint)
    except Exception as error:  # whatever a converter meets in a file of another format
        raise InputError(
            f"the file is no {transformer_class} in a format that diffusers converts",
            where=f"--transformer {path}",
            why=f"its conversion ended with {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            advice="check that the file is of this model; one tensor of it may be missing",
        ) from error


def _runs(numbers: Tensor, header: Header) -> Iterator[StoredTensor]:
    """Yield numbered rows as runs of neighbours."""
    names = list(header.entries)
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    for piece in numbers.tensor_split(breaks):
        index, start = divmod(int(piece[0]), _STRIDE)
        yield header.stored(names[index]).rows(start, start + len(piece))


def _joined(pieces: Sequence[StoredTensor]) -> Stored:
    return pieces[0] if len(pieces) == 1 else JoinedTensor(tuple(pieces))
