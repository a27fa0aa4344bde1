"""Write a safetensors file tensor by tensor, holding none of them.

A safetensors file is a JSON header (name → dtype, shape, place) behind its own length, and then the bytes of all
tensors without gaps. Whoever knows every shape and dtype in advance knows the whole header and the place of each
tensor, so the header can be written first and the tensors in any order, even a few rows at a time. The order of the
places is that of the safetensors library (dtypes with the strictest alignment first, then by name), so the file has
the same bytes as one that the library wrote from memory.

Worked example: a (2, 3) int8 `a.weight` and a (2, 1) float32 `a.scale`. The scale comes first because it needs 4-byte
alignment: bytes 0 to 8 behind the header, and the weight 8 to 14. Row 1 of the weight goes to byte 11.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from quant_core.tensor_bytes import raw_bytes

# In the format's own order of alignment, the strictest last.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
# The other way round: the format's name of a dtype -> the dtype.
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_ALIGNMENT_ORDER = {dtype: index for index, dtype in enumerate(_DTYPES)}
# The header is padded so that the tensors behind it begin at a multiple of this.
_HEADER_ALIGNMENT = 8


class TensorFile:
    """Write tensors of known shapes into a new safetensors file, as a context manager.

    `described` maps each name to a tensor of the final shape and dtype, on any device (the meta device costs nothing).
    Leaving the block without an error checks that every byte of every tensor was written.
    """

    def __init__(self, path: Path, described: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._path, self._described = path, dict(described)
        header, places = _lay_out(self._described, metadata)
        self._header = header
        self._starts = {name: len(header) + place for name, place in places.items()}
        self._missing = {name: tensor.numel() for name, tensor in self._described.items()}
        self._file: BinaryIO

    def __enter__(self) -> TensorFile:
        self._file = self._path.open("wb")
        self._file.write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        unwritten = [name for name, numel in self._missing.items() if numel]
        if kind is None and unwritten:
            raise AssertionError(f"{self._path.name}: tensors described but not written: {unwritten[:5]}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self._write(name, tensor, start=0)

    def write_rows(self, name: str, rows: Tensor, first: int) -> None:
        """Write consecutive rows of a tensor (its first dimension), the first of them being row `first`."""
        self._write(name, rows, start=first * rows[0].numel())

    def _write(self, name: str, part: Tensor, start: int) -> None:
        whole = self._described[name]
        if part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:] or start + part.numel() > whole.numel():
            raise AssertionError(f"{name} was described as {tuple(whole.shape)} {whole.dtype}, not {tuple(part.shape)}")
        self._file.seek(self._starts[name] + start * whole.element_size())
        self._file.write(raw_bytes(part))
        self._missing[name] -= part.numel()


def _lay_out(described: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the file's bytes in front of the tensors, and where each tensor begins behind them."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name in sorted(described, key=lambda name: (-_ALIGNMENT_ORDER[described[name].dtype], name)):
        tensor = described[name]
        places[name], end = end, end + tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [places[name], end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, places
