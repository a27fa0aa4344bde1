"""Read tensors, or parts of them, from where they lie in safetensors files, and not one byte more.

The header of a file says where each tensor begins. Reading from there into memory of our own is as fast as the disk;
a mapped file would hold every page that was touched, and a fault for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from model_adapters.weights.model_folder import damaged_weights, open_weights
from quant_core.checkpoint.tensor_file import DTYPES
from quant_core.parallel.sharding import Slice
from quant_core.reused_memory import Empty, fresh
from quant_core.tensor_bytes import raw_bytes


@dataclass(frozen=True)
class StoredTensor:
    """Know where a tensor lies: its file, the byte where it begins, its dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, parts: Sequence[Slice] = (), empty: Empty = fresh) -> Tensor:
        """Return the parts, concatenated, or the whole tensor without any: contiguous, on the host, in given memory.

        Raises InputError when the file ends early or cannot be read.
        """
        shape = list(self.shape)
        if parts:
            shape[parts[0].dim] = sum(part.stop - part.start for part in parts)
        tensor = empty(shape, self.dtype)
        if not tensor.numel():
            return tensor
        memory, filled = raw_bytes(tensor), 0
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                for start, length in self._runs(parts):
                    self._fill(file, memory[filled : filled + length], start)
                    filled += length
            finally:
                os.close(file)
        except OSError as error:
            raise damaged_weights(self.path, str(error)) from error
        return tensor

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Return a range of its rows as a tensor of its own."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, start=self.start + start * row, shape=(stop - start, *self.shape[1:]))

    def _runs(self, parts: Sequence[Slice]) -> Iterator[tuple[int, int]]:
        """Yield place and length in bytes of all that lies in one piece, in the order of the result."""
        dim = parts[0].dim if parts else 0
        unit = prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        width = self.shape[dim] if self.shape else 1
        ranges = [(part.start, part.stop) for part in parts] or [(0, width)]
        for outer in range(prod(self.shape[:dim])):
            for first, stop in ranges:
                yield self.start + (outer * width + first) * unit, (stop - first) * unit

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

    def read(self, parts: Sequence[Slice] = (), empty: Empty = fresh) -> Tensor:
        """Return the parts, concatenated, or the whole tensor without any, as `StoredTensor.read` does.

        It is made of several, so it has memory of its own.
        """
        if not parts or parts[0].dim:
            return torch.cat([piece.read(parts) for piece in self.pieces])
        return torch.cat([rows.read() for part in parts for rows in self._rows(part)])

    def _rows(self, part: Slice) -> Iterator[StoredTensor]:
        begin = 0
        for piece in self.pieces:
            first, stop = max(part.start - begin, 0), min(part.stop - begin, piece.shape[0])
            if first < stop:
                yield piece.rows(first, stop)
            begin += piece.shape[0]


Stored = StoredTensor | JoinedTensor


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a safetensors file by name, reading the header; raises InputError for a damaged one."""
    with open_weights(path), path.open("rb") as file:  # the library checks the header
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise damaged_weights(path, f"tensor {name} has the type {entry['dtype']}, which no model has")
    return {
        name: StoredTensor(path, 8 + size + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }
