"""The manifest: the last file of a run, whose presence says that the checkpoint beside it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.files.shard_note import FileDigest, ShardNote
from quant_core.atomic_file import write_text_atomically
from quant_core.errors import InputError, few


class TimestepPolicy(BaseModel):
    """Tell the runtime which steps run static; it runs every step dynamic if nobody does.

    `registration` holds the line to paste into the inference program, by MindIE-SD version (none if no step is static).
    """

    model_config = ConfigDict(extra="forbid")

    timesteps: int
    timestep_sep: int
    registration: dict[str, str]

    @classmethod
    def of(cls, timesteps: int, timestep_sep: int) -> TimestepPolicy:
        """Write the registration of steps `timestep_sep` to `timesteps` as static."""
        static = f"range({timestep_sep}, {timesteps})"
        lines = {
            "3.0": f'policy.register({static}, "static")',
            "3.1": f'policy.register({static}, "static", target="w8a8_static_linear")',
        }
        registration = lines if timestep_sep < timesteps else {}
        return cls(timesteps=timesteps, timestep_sep=timestep_sep, registration=registration)


class Manifest(BaseModel):
    """Describe a published checkpoint: its files, what made it, how it is divided."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    quant_type: str
    fingerprint: str
    fields: dict[str, Any]
    layout: str
    tp_size: int
    dp_size: int
    files: list[FileDigest]
    timestep_policy: TimestepPolicy | None = None

    @classmethod
    def of(cls, notes: list[ShardNote]) -> Manifest:
        """Describe the checkpoint that consists of the noted shards."""
        first = notes[0]
        policy = None
        if first.timesteps is not None and first.timestep_sep is not None:
            policy = TimestepPolicy.of(first.timesteps, first.timestep_sep)
        return cls(
            quant_type=first.quant_type,
            fingerprint=first.fingerprint,
            fields=first.fields,
            layout=first.layout,
            tp_size=first.tp_size,
            dp_size=first.dp_size,
            files=[file for note in notes for file in (note.weights, note.description)],
            timestep_policy=policy,
        )

    def write(self, path: Path) -> None:
        """Publish the manifest."""
        write_text_atomically(path, self.model_dump_json(indent=2, exclude_none=True) + "\n")

    def changed_files(self, folder: Path) -> list[str]:
        """Return the names of the files that are missing in the folder or have another content than noted."""
        return [file.name for file in self.files if not file.is_of(folder / file.name)]


def another_jobs(manifest: Path, differences: Sequence[str]) -> InputError:
    """Return the error that what is published there is another job's, given how that differs."""
    return InputError(
        "the output folder holds the checkpoint of another job",
        where=str(manifest),
        why=few(differences, shown=5),
        advice="use another --quant_weight_save_folder, or --overwrite to replace it",
    )


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest at `path`, or None when there is none; raises InputError when it is damaged."""
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(
            "the manifest of a checkpoint cannot be read",
            where=str(path),
            why=" ".join(str(error).split())[:200],
            advice="remove it and run the job again",
        ) from None
