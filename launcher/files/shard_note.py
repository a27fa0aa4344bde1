"""What a rank notes about the shard it staged, so that the merge can check all shards without loading them.

A note is JSON beside the shard, written after it: a shard without a note was cut short. It holds what only the rank
knew (how each layer is divided, the full shapes) and digests of the tensors that must be the same on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from launcher.files.digests import digest_of_file, remember
from launcher.files.fingerprint import Fingerprint
from launcher.files.run_folder import STAGING, RunFolder
from launcher.files.smoothed_inputs import smoothed_text
from model_adapters.weights.loading import LoadedTransformer
from model_adapters.weights.transformer_part import TransformerPart
from quant_core.atomic_file import write_text_atomically
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.tensor_file import WrittenDigests
from quant_core.errors import InputError
from quant_core.parallel.sharding import Shard, Style
from quant_core.session.quantize import QuantizedModel


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileDigest(_Frozen):
    """Identify a file by name, size in bytes and sha256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> FileDigest:
        """Describe a file; it is read if its digest is not known."""
        return cls(name=path.name, bytes=path.stat().st_size, sha256=sha256 or digest_of_file(path))

    def is_of(self, path: Path, *, trusted: bool = False) -> bool:
        """Tell whether a file is there with this content; one that this very run wrote is trusted if its size fits."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        return trusted or digest_of_file(path) == self.sha256


class LayerShard(_Frozen):
    """How a linear layer is divided; the rank and the number of ranks stand in the note."""

    style: Style
    blocks: tuple[int, ...] = ()


class ShardNote(_Frozen):
    """Describe one staged shard.

    `layers` are the divided linears, `full_shapes` the tensors of the undivided float model, `equal` the sha256 of
    each tensor that all ranks must hold alike. `job`, `decisions` and `smoothed` are texts that are published beside
    the shards.
    """

    version: Literal[1] = 1
    fingerprint: str
    fields: dict[str, Any]
    quant_type: str
    tp_rank: int
    tp_size: int
    dp_size: int
    layout: str
    weights: FileDigest
    description: FileDigest
    layers: dict[str, LayerShard]
    full_shapes: dict[str, tuple[int, ...]]
    equal: dict[str, str]
    timesteps: int | None = None
    timestep_sep: int | None = None
    job: str = ""
    decisions: str = ""
    smoothed: str = ""

    def shard(self, layer: str) -> Shard:
        """Return this rank's shard of a linear layer; whole when the layer is not divided."""
        found = self.layers.get(layer, LayerShard(style=Style.REPLICATED))
        return Shard(found.style, self.tp_rank, self.tp_size, found.blocks)

    def files(self, folder: Path) -> CheckpointFiles:
        """Return where the shard's files are below the output folder: still staged, or already published."""

        def place(name: str) -> Path:
            staged = folder / STAGING / name
            return staged if staged.exists() else folder / name

        return CheckpointFiles(place(self.weights.name), place(self.description.name))

    def is_whole(self, folder: Path, *, trusted: bool = False) -> bool:
        """Tell whether both files are there with the noted content; trusted: this run wrote or read them."""
        files, given = self.files(folder), {"trusted": trusted}
        return self.weights.is_of(files.weights, **given) and self.description.is_of(files.description, **given)


def write_note(
    folder: RunFolder,
    fingerprint: Fingerprint,
    result: QuantizedModel,
    part: TransformerPart | LoadedTransformer,
    *,
    layout: str,
    digests: WrittenDigests,
    job: str,
    decisions: str,
) -> None:
    """Describe the shard of a rank's part that was just staged, and publish the note beside it.

    digests: collected while it was written. job, decisions: texts that are published with it.
    """
    files, mesh = folder.staged(), folder.mesh
    if digests.file:
        remember(files.weights, digests.file)
    note = ShardNote(
        fingerprint=fingerprint.digest,
        fields=dict(fingerprint.fields),
        quant_type=result.quant_type,
        tp_rank=mesh.tp_rank,
        tp_size=mesh.tp_size,
        dp_size=mesh.dp_size,
        layout=layout,
        weights=FileDigest.of(files.weights, digests.file),
        description=FileDigest.of(files.description),
        layers={name: LayerShard(style=s.style, blocks=s.blocks) for name, s in part.shards.items()},
        full_shapes=part.full_shapes,
        equal=digests.tensors,
        timesteps=result.timesteps,
        timestep_sep=result.timestep_sep,
        job=job,
        decisions=decisions,
        smoothed=smoothed_text(result.smoothed_inputs, fingerprint.digest),
    )
    write_text_atomically(folder.note(), note.model_dump_json(indent=1) + "\n")


def read_note(path: Path) -> ShardNote | None:
    """Return the note at `path`, or None when there is none; raises InputError when it is damaged."""
    if not path.exists():
        return None
    try:
        return ShardNote.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise InputError(
            "the note of a staged shard cannot be read",
            where=str(path),
            why=" ".join(str(error).split())[:200],
            advice=f"remove {path.parent} and quantize again",
        ) from None


def layer_of(tensor_name: str, full_shapes: Mapping[str, object]) -> tuple[str, str]:
    """Split a checkpoint tensor's name into the float model's layer and the tensor.

    A smoothed layer `L` is written as `L.div` and `L.linear`, which only the float model's own names tell from a
    layer that is called `linear`.
    """
    owner, _, tensor = tensor_name.rpartition(".")
    if f"{owner}.weight" not in full_shapes and tensor_name not in full_shapes:
        parent, _, part = owner.rpartition(".")
        if part in ("div", "linear") and f"{parent}.weight" in full_shapes:
            return parent, tensor
    return owner, tensor


def equal_on_all_ranks(
    shards: Mapping[str, Shard], full_shapes: Mapping[str, object], *, scales_are_global: bool
) -> Callable[[str, Tensor], bool]:
    """Return what tells, by a checkpoint tensor's name and value, whether all ranks must hold it alike."""

    def is_equal(name: str, value: Tensor) -> bool:
        layer, tensor = layer_of(name, full_shapes)
        if f"{layer}.weight" not in full_shapes and name not in full_shapes:
            return False  # no part of the float model: attention scales, which are per local head
        shard = shards.get(layer)
        return shard is None or held_alike(shard, tensor, value.shape, scales_are_global)

    return is_equal


def held_alike(shard: Shard, tensor: str, shape: Sequence[int], scales_are_global: bool) -> bool:
    """Tell whether all ranks hold this tensor of a divided layer alike.

    A column-split layer sees the whole input everywhere. A row-split one sees its own channels, so its scales agree
    only when they were made to, and its biases never do.
    """
    if shard.size == 1 or shard.divides(tensor, len(shape)):
        return shard.size == 1
    return shard.split_dim == 0 or (scales_are_global and tensor not in ("bias", "quant_bias"))
