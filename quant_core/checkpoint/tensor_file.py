"""Write a safetensors file tensor by tensor, holding none of them.

A safetensors file is a JSON header (name → dtype, shape, place) behind its own length, and then the bytes of all
tensors without gaps. Whoever knows every shape and dtype in advance knows the whole header and the place of each
tensor, so the header can be written first and the tensors in any order, even a few rows at a time. The order of the
places is that of the safetensors library (dtypes with the strictest alignment first, then by name), so the file has
the same bytes as one that the library wrote from memory.

Worked example: a (2, 3) int8 `a.weight` and a (2, 1) float32 `a.scale`. The scale comes first because it needs 4-byte
alignment: bytes 0 to 8 behind the header, and the weight 8 to 14. Row 1 of the weight goes to byte 11.

A digest follows the order of the bytes, and a layer's scale is known together with its codes. So a quantized checkpoint
has its codes in front, in any order that a reader knows no difference of, and everything small behind: then one pass
over the weights writes and digests the file from its beginning to its end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quant_core.checkpoint.ordered_writer import OrderedWriter
from quant_core.tensor_bytes import digest_of_bytes, raw_bytes

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


@dataclass
class WrittenDigests:
    """Collect sha256 digests while a file is written, so that nobody reads it again for them.

    wanted: by name and tensor, of which tensors (each written whole) the own digest is wanted. file: of the whole file,
    once it is closed; tensors: of dtype, shape and bytes, by name.
    """

    wanted: Callable[[str, Tensor], bool] = lambda name, tensor: False
    file: str | None = None
    tensors: dict[str, str] = field(default_factory=dict)


class TensorFile:
    """Write tensors of known shapes into a new safetensors file, as a context manager.

    `described` maps each name to a tensor of the final shape and dtype, on any device (the meta device costs nothing).
    `in_front`: the dtype whose tensors come first. A thread writes while the caller computes; what was handed over must
    not be changed any more. Leaving the block without an error checks that every byte of every tensor was written.
    """

    def __init__(
        self,
        path: Path,
        described: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        *,
        in_front: torch.dtype | None = None,
        digests: WrittenDigests | None = None,
    ) -> None:
        self._path, self._described, self._digests = path, dict(described), digests
        header, places = _lay_out(self._described, metadata, in_front)
        self._header = header
        self._starts = {name: len(header) + place for name, place in places.items()}
        self._missing = {name: tensor.numel() for name, tensor in self._described.items()}
        self._writer: OrderedWriter

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the order of the file, in which a digest costs least."""
        return list(self._starts)

    def __enter__(self) -> TensorFile:
        self._writer = OrderedWriter(self._path, digests=self._digests is not None)
        self._writer.put(0, lambda: memoryview(self._header))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        digest = self._writer.close(keeps=kind is None)
        unwritten = [name for name, numel in self._missing.items() if numel]
        if kind is None and unwritten:
            raise AssertionError(f"{self._path.name}: tensors described but not written: {unwritten[:5]}")
        if self._digests is not None:
            self._digests.file = digest

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
        self._writer.put(self._starts[name] + start * whole.element_size(), lambda: self._bytes(name, part))
        self._missing[name] -= part.numel()

    def _bytes(self, name: str, part: Tensor) -> memoryview:
        """Return the bytes of a part, on the host, and note the digest of a tensor that somebody wants it of."""
        data = raw_bytes(part)
        if self._digests is not None and self._digests.wanted(name, part):
            self._digests.tensors[name] = digest_of_bytes(part, data)
        return data


def _lay_out(
    described: Mapping[str, Tensor], metadata: Mapping[str, str], in_front: torch.dtype | None
) -> tuple[bytes, dict[str, int]]:
    """Return the file's bytes in front of the tensors, and where each tensor begins behind them, in that order."""
    # Tensors behind it have to stay aligned, so it comes first only where its bytes are a multiple of any alignment.
    if sum(tensor.nbytes for tensor in described.values() if tensor.dtype == in_front) % _HEADER_ALIGNMENT:
        in_front = None
    order = {name: (t.dtype != in_front, -_ALIGNMENT_ORDER[t.dtype], name) for name, t in described.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name in sorted(described, key=order.__getitem__):
        tensor = described[name]
        places[name], end = end, end + tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [places[name], end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, places
