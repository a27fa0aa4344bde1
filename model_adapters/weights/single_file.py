"""See a transformer in one safetensors file, in whatever format it was published, as if diffusers had saved it.

diffusers converts the published formats by renaming tensors and by cutting and joining them along their rows, and does
so with the whole model in memory. Here its conversion runs once on tensors of row numbers: what comes out says for each
row of a converted tensor which row of which tensor of the file it is. With that any slice is read from the file
directly, and nothing else is.

Worked example: the file's `qkv` has 6 rows, numbered 0 to 5. The conversion splits it into three, so `to_k` comes out
as rows 2 and 3: reading the second half of `to_k` reads row 3 of `qkv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model_adapters.weights.model_folder import open_weights
from quant_core.errors import InputError

# A row's number counts from here for each tensor of the file: no tensor has as many rows.
_STRIDE = 2**32


class _Run(NamedTuple):
    """Rows `start` to `stop` of a tensor of the file."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class SingleFile:
    """Know where in a file the rows of each converted tensor are."""

    runs: Mapping[str, Sequence[_Run]]

    @classmethod
    def of(cls, path: Path, transformer_class: str, expected: Mapping[str, object]) -> SingleFile:
        """Look at a file's header; expected: the names of the model's tensors.

        Raises InputError when the format is none that diffusers converts.
        """
        with open_weights(path) as file:
            rows = {name: [*file.get_slice(name).get_shape(), 1][0] for name in file.keys()}  # noqa: SIM118
            ranks = {name: len(file.get_slice(name).get_shape()) for name in rows}
        if set(rows) == set(expected):
            return cls({name: (_Run(name, 0, count),) for name, count in rows.items()})
        numbered = {
            name: (torch.arange(rows[name]) + index * _STRIDE).view(-1, *[1] * (ranks[name] - 1))
            for index, name in enumerate(rows)
            if ranks[name]
        }
        converted = _convert(numbered, path, transformer_class)
        names = list(rows)
        return cls({name: tuple(_runs(tensor.flatten(), names)) for name, tensor in converted.items()})

    @contextmanager
    def open(self, path: Path) -> Iterator[_View]:
        """Open the file for reading slices of converted tensors."""
        with open_weights(path) as file:
            yield _View(file, self.runs)


@dataclass(frozen=True)
class _View:
    """Answer like an open safetensors file."""

    file: Any
    runs: Mapping[str, Sequence[_Run]]

    def keys(self) -> list[str]:
        return list(self.runs)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.file, self.runs[name])


@dataclass(frozen=True)
class _Slice:
    """Answer like a safetensors slice."""

    file: Any
    runs: Sequence[_Run]

    def get_shape(self) -> list[int]:
        _, *others = self.file.get_slice(self.runs[0].source).get_shape()
        return [sum(run.stop - run.start for run in self.runs), *others]

    def get_dtype(self) -> str:
        return self.file.get_slice(self.runs[0].source).get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        rows, *others = (slice(None),) if index is ... else index
        first, last, _ = rows.indices(self.get_shape()[0])
        parts, begin = [], 0
        for source, start, stop in self.runs:
            low, high = max(first - begin, 0), min(last - begin, stop - start)
            if low < high:
                parts.append(self.file.get_slice(source)[(slice(start + low, start + high), *others)])
            begin += stop - start
        return torch.cat(parts) if len(parts) > 1 else parts[0]


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


def _runs(numbers: Tensor, names: Sequence[str]) -> Iterator[_Run]:
    """Return numbered rows as runs of neighbours."""
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    for piece in numbers.tensor_split(breaks):
        index, start = divmod(int(piece[0]), _STRIDE)
        yield _Run(names[index], start, start + len(piece))
