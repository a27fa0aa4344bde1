"""Read tensors, or parts of them, from where they lie in safetensors files, and not one byte more.

The header of a file says where each tensor begins. Reading from there into memory of our own is as fast as the disk;
a mapped file would hold every page that was touched, and a fault for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model_adapters.weights.model_folder import damaged_weights, open_weights
from model_adapters.weights.passing_read import PassingRead
from quant_core.checkpoint.tensor_file import DTYPES
from quant_core.errors import InputError
from quant_core.parallel.sharding import Slice
from quant_core.reused_memory import Empty, fresh
from quant_core.tensor_bytes import raw_bytes

# How safetensors calls floats of 8 bits and less.
_SMALL_FLOATS = ("F8", "F6", "F4")


class Reading(NamedTuple):
    """Say how to read: into memory of whom; passing: where the system's cache has no room for all that is read."""

    empty: Empty = fresh
    passing: PassingRead | None = None


PLAIN = Reading()


@dataclass(frozen=True)
class StoredTensor:
    """Know where a tensor lies: its file, the byte where it begins, its dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, parts: Sequence[Slice] = (), rows: slice | None = None, how: Reading = PLAIN) -> Tensor:
        """Return the parts, concatenated, or the whole tensor without any: contiguous, on the host.

        rows: only these of the result. Raises InputError when the file ends early or cannot be read.
        """
        shape = list(self.shape)
        if parts:
            shape[parts[0].dim] = sum(part.stop - part.start for part in parts)
        if rows is not None:
            shape[0] = rows.stop - rows.start
        tensor = how.empty(shape, self.dtype)
        if not tensor.numel():
            return tensor
        memory, filled = raw_bytes(tensor), 0
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                for start, length in self._runs(parts, rows):
                    self._fill(file, memory[filled : filled + length], start)
                    filled += length
            finally:
                os.close(file)
        except OSError as error:
            raise damaged_weights(self.path, str(error)) from error
        if how.passing:
            for first, stop in self._row_ranges(parts, rows):
                how.passing.note(self.path, self.start + first * self._row_bytes, self.start + stop * self._row_bytes)
        return tensor

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Return a range of its rows as a tensor of its own."""
        return replace(self, start=self.start + start * self._row_bytes, shape=(stop - start, *self.shape[1:]))

    @property
    def _row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def _row_ranges(self, parts: Sequence[Slice], rows: slice | None) -> Iterator[tuple[int, int]]:
        """Yield the rows that hold what is wanted; all of their columns or some."""
        return _ranges(() if parts and parts[0].dim else parts, rows, self.shape[0] if self.shape else 1)

    def _runs(self, parts: Sequence[Slice], rows: slice | None) -> Iterator[tuple[int, int]]:
        """Yield place and length in bytes of all that lies in one piece, in the order of the result."""
        dim = parts[0].dim if parts else 0
        for first, stop in self._row_ranges(parts, rows):
            if not dim:
                yield self.start + first * self._row_bytes, (stop - first) * self._row_bytes
                continue
            width, lines = self.shape[dim], prod(self.shape[1:dim])
            unit = prod(self.shape[dim + 1 :]) * self.dtype.itemsize
            for line in range(first * lines, stop * lines):
                for part in parts:
                    yield self.start + (line * width + part.start) * unit, (part.stop - part.start) * unit

    def _fill(self, file: int, memory: memoryview, start: int) -> None:
        filled = 0
        while filled < len(memory):
            count = os.preadv(file, [memory[filled:]], start + filled)
            if not count:
                raise damaged_weights(self.path, "it ends before its last tensor")
            filled += count


@dataclass(frozen=True)
class JoinedTensor:
    """Know a tensor whose rows lie in several places of one file, one piece below the other."""

    pieces: tuple[StoredTensor, ...]

    @property
    def path(self) -> Path:
        """The file that holds all pieces."""
        return self.pieces[0].path

    @property
    def start(self) -> int:
        """The byte where the first piece begins."""
        return self.pieces[0].start

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    def read(self, parts: Sequence[Slice] = (), rows: slice | None = None, how: Reading = PLAIN) -> Tensor:
        """Return the parts, concatenated, or the whole tensor without any, as `StoredTensor.read` does.

        It is made of several, so it has memory of its own.
        """
        columns, own = (parts, ()) if parts and parts[0].dim else ((), parts)
        ranges = _ranges(own, rows, self.shape[0])
        pieces = [piece for first, stop in ranges for piece in self._rows(first, stop)]
        return torch.cat([piece.read(columns, how=how._replace(empty=fresh)) for piece in pieces])

    def _rows(self, start: int, stop: int) -> Iterator[StoredTensor]:
        begin = 0
        for piece in self.pieces:
            first, last = max(start - begin, 0), min(stop - begin, piece.shape[0])
            if first < last:
                yield piece.rows(first, last)
            begin += piece.shape[0]


Stored = StoredTensor | JoinedTensor


@dataclass(frozen=True)
class Header:
    """Know what a safetensors file says of its tensors, by name, and the byte where their bytes begin."""

    path: Path
    start: int
    entries: Mapping[str, Mapping[str, Any]]

    def stored(self, name: str) -> StoredTensor:
        """Return where a tensor lies; raises InputError for one of a type that no weights to quantize have."""
        entry = self.entries[name]
        if entry["dtype"].startswith(_SMALL_FLOATS):
            raise InputError(
                f"the weights are floats of less than 16 bits, {entry['dtype']}, which are not read",
                where=str(self.path),
                why=f"tensor {name} lost digits already, and quantizing it would lose more",
                advice="give the file with the model's weights in bfloat16 or float16",
            )
        if entry["dtype"] not in DTYPES:
            raise damaged_weights(self.path, f"tensor {name} has the type {entry['dtype']}, which no model has")
        start = self.start + entry["data_offsets"][0]
        return StoredTensor(self.path, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file; raises InputError for a damaged one."""
    with open_weights(path), path.open("rb") as file:  # the library checks the header
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return Header(path, 8 + size, entries)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a safetensors file by name; raises InputError as above."""
    header = read_header(path)
    return {name: header.stored(name) for name in header.entries}


def _ranges(parts: Sequence[Slice], rows: slice | None, height: int) -> Iterator[tuple[int, int]]:
    """Yield which rows of a tensor of that height are the wanted rows of its parts, or of the whole without any."""
    begin = 0
    for start, stop in [(part.start, part.stop) for part in parts] or [(0, height)]:
        height = stop - start
        first, last = (0, height) if rows is None else (max(rows.start - begin, 0), min(rows.stop - begin, height))
        if first < last:
            yield start + first, start + last
        begin += height
