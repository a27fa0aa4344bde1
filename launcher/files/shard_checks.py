"""Check the shards of all ranks against each other before anything is published.

First each shard must be one that our own reader accepts, tensor by tensor. Then each check looks at all notes and the
headers of all files, and yields what it objects to; these load no tensor: shapes stand in the headers, equality in the
digests that the ranks noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.files.shard_note import ShardNote, layer_of
from quant_core.checkpoint.entries import FA_QUANT_TYPE_KEY, MODEL_TYPE_KEY, CheckpointFiles
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.checkpoint.tensor_parts import TensorFiles
from quant_core.errors import VerificationError, few

_AGAIN = "quantize all ranks again in one run (--resume never)"


@dataclass(frozen=True)
class OpenedShard:
    """A note with what its two files say: the shape of each tensor, and the description."""

    note: ShardNote
    shapes: Mapping[str, tuple[int, ...]]
    description: Mapping[str, Any]

    @classmethod
    def of(cls, note: ShardNote, folder: Path) -> OpenedShard:
        """Read the headers of a shard's files; raises InputError when they cannot be read."""
        files = note.files(folder)
        shapes = {name: info.shape for name, info in TensorFiles(files.weights).infos().items()}
        description = read_object(files.description)
        return cls(note, shapes, description)


Check = Callable[[Sequence[OpenedShard]], Iterator[str]]


def check_shards(shards: Sequence[OpenedShard]) -> None:
    """Raise VerificationError with everything that any check objects to."""
    problems = [problem for check in CHECKS for problem in check(shards)]
    if problems:
        shown = few(problems, shown=5)
        raise VerificationError(
            "the shards do not fit together, nothing was published",
            where=f"{len(shards)} shards of {shards[0].note.quant_type}",
            why=shown,
            advice=_AGAIN,
        )


def check_contract(files: CheckpointFiles, *, with_values: bool = True) -> None:
    """Hold a staged shard against the consumer's rules; raises VerificationError naming the file and the tensor.

    with_values: read it whole; without, its description and headers only.
    """
    try:
        checkpoint = open_checkpoint(files)
        if with_values:
            checkpoint.verify()
    except VerificationError as error:
        raise VerificationError(
            error.what,
            where=error.where,
            why="; ".join(filter(None, [error.why, "nothing was published"])),
            advice=_AGAIN,
        ) from error


def _one_job(shards: Sequence[OpenedShard]) -> Iterator[str]:
    for field in ("fingerprint", "quant_type", "layout", "tp_size", "timesteps", "timestep_sep"):
        values = {getattr(shard.note, field) for shard in shards}
        if len(values) > 1:
            yield f"{field} differs between ranks: {sorted(map(str, values))}"


def _complete(shards: Sequence[OpenedShard]) -> Iterator[str]:
    ranks = [shard.note.tp_rank for shard in shards]
    if ranks != list(range(shards[0].note.tp_size)):
        yield f"shards are of ranks {ranks}, not of 0 to {shards[0].note.tp_size - 1}"


def _described(shards: Sequence[OpenedShard]) -> Iterator[str]:
    for shard in shards:
        listed = {name for name in shard.description if name not in (MODEL_TYPE_KEY, FA_QUANT_TYPE_KEY)}
        for name in sorted(listed ^ set(shard.shapes))[:3]:
            yield f"rank {shard.note.tp_rank}: '{name}' stands in only one of weights and description"


def _same_layers(shards: Sequence[OpenedShard]) -> Iterator[str]:
    """Same tensors and types on all ranks, but for the biases that live on the first."""
    for shard in shards[1:]:
        expected = {name: kind for name, kind in shards[0].description.items() if not _lives_elsewhere(shard, name)}
        for name in sorted(expected.items() ^ shard.description.items())[:3]:
            yield f"rank {shard.note.tp_rank} and rank 0 describe '{name[0]}' differently"


def _lives_elsewhere(shard: OpenedShard, name: str) -> bool:
    layer, tensor = layer_of(name, shard.note.full_shapes)
    return tensor == "bias" and not shard.note.shard(layer).has_bias


def _add_up(shards: Sequence[OpenedShard]) -> Iterator[str]:
    """Each rank's part of every float tensor has the shape that its slice of the whole must have."""
    for shard in shards:
        present = {".".join(layer_of(name, shard.note.full_shapes)): shape for name, shape in shard.shapes.items()}
        for name, full in shard.note.full_shapes.items():
            layer, _, tensor = name.rpartition(".")
            if name not in present or layer not in shard.note.layers:
                continue
            expected = shard.note.shard(layer).local_shape(tensor, full)
            if present[name] != expected:
                yield f"rank {shard.note.tp_rank}: '{name}' is {present[name]}, its slice of {full} is {expected}"


def _nothing_lost(shards: Sequence[OpenedShard]) -> Iterator[str]:
    """Every parameter of the float model is on every rank, a row-split bias on the first only."""
    for shard in shards:
        present = {".".join(layer_of(name, shard.note.full_shapes)) for name in shard.shapes}
        expected = {name for name in shard.note.full_shapes if not _lives_elsewhere(shard, name)}
        for name in sorted(expected - present)[:3]:
            yield f"rank {shard.note.tp_rank}: '{name}' is missing"
        for name in sorted(set(shard.note.full_shapes) & present - expected)[:3]:
            yield f"rank {shard.note.tp_rank}: '{name}' must live on rank 0 only"


def _equal(shards: Sequence[OpenedShard]) -> Iterator[str]:
    for shard in shards[1:]:
        for name in sorted(dict(shards[0].note.equal.items() ^ shard.note.equal.items()))[:3]:
            yield f"'{name}' must be the same on all ranks, but rank {shard.note.tp_rank} differs from rank 0"


CHECKS: tuple[Check, ...] = (_one_job, _complete, _described, _same_layers, _add_up, _nothing_lost, _equal)
