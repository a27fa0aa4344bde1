"""MERGE: check all shards against each other, move them to their final names, and write the manifest last.

A manifest that is there vouches for what lies beside it, so an old one goes before the first file is replaced: an
interruption leaves either the old checkpoint with its manifest, or no manifest and shards that a second run or
`launcher merge` publishes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.cli.command_line import MergeFiles
from launcher.failure.phases import run_together
from launcher.files.manifest import Manifest
from launcher.files.run_folder import MANIFEST, STAGING, note_file, tp_suffix
from launcher.files.shard_checks import OpenedShard, check_shards
from launcher.files.shard_note import ShardNote, read_note
from launcher.stages.job import QuantJob
from quant_core.atomic_file import write_text_atomically
from quant_core.errors import InputError

_NOTES = "quant_shard_note_*.json"


def merge(job: QuantJob) -> None:
    """Publish the shards that all ranks staged; rank 0 works, the others learn how it went."""
    job.watch.enter("merge")

    def publish() -> Manifest | None:
        if job.ranks.rank != 0:
            return None
        names = [job.folder.note(tp_rank) for tp_rank in range(job.ranks.mesh.tp_size)]
        write_text_atomically(job.folder.job, job.config.to_yaml())
        return publish_shards(job.folder.weights, names)

    manifest = run_together(job.ranks, "merging", publish)
    if manifest is not None:
        report(job.folder.weights, manifest, job.console.say)


def merge_files(command: MergeFiles) -> None:
    """Publish the shards that an earlier run left staged in a folder."""
    scheme = command.quant_type.removesuffix("_fa3") if command.quant_type else None
    pattern = f"quant_shard_note_{scheme}*.json" if scheme else _NOTES
    found = [note for path in sorted((command.folder / STAGING).glob(pattern)) if (note := read_note(path))]
    types = sorted({note.quant_type.lower() for note in found if scheme in (None, note.quant_type.lower())})
    if len(types) != 1:
        raise InputError(
            "there are no staged shards to merge" if not types else f"there are shards of {' and '.join(types)}",
            where=str(command.folder / STAGING),
            why="merging takes the shards of one job, which its ranks stage before they publish",
            advice="run the job (published shards need no merge)" if not types else "choose one with --quant_type",
        )
    tp_size = next(note.tp_size for note in found if note.quant_type.lower() == types[0])
    names = [note_file(command.folder / STAGING, types[0], tp_suffix(rank, tp_size)) for rank in range(tp_size)]
    report(command.folder, publish_shards(command.folder, names), print)


def publish_shards(folder: Path, note_paths: list[Path]) -> Manifest:
    """Check the noted shards and publish them in the folder; returns the manifest.

    Raises InputError for shards that are missing or damaged, VerificationError for shards that do not fit together.
    """
    notes = [_require(path, folder) for path in note_paths]
    check_shards([OpenedShard.of(note, folder) for note in notes])
    manifest = Manifest.of(notes)
    (folder / MANIFEST).unlink(missing_ok=True)
    for note in notes:
        files = note.files(folder)
        for path in (files.weights, files.description):
            os.replace(path, folder / path.name)
    manifest.write(folder / MANIFEST)
    shutil.rmtree(folder / STAGING)
    return manifest


def report(folder: Path, manifest: Manifest, say: Callable[[str], object]) -> None:
    """Say what was published, and what the user of a per-step checkpoint still has to do."""
    say(f"merge: {len(manifest.files)} files and {MANIFEST} in {folder}")
    if manifest.timestep_policy is not None:
        policy = manifest.timestep_policy
        say(f"runtime: register steps {policy.timestep_sep} to {policy.timesteps - 1} as static, or all run dynamic:")
        for version, line in policy.registration.items():
            say(f"  MindIE-SD {version}: {line}")


def _require(path: Path, folder: Path) -> ShardNote:
    note = read_note(path)
    if note is None or not note.is_whole(folder):
        raise InputError(
            "a shard is missing or damaged" if note else "a rank has not finished its shard",
            where=str(path),
            why="the files do not have the content that the rank noted" if note else "it left no note",
            advice="run the job again; finished shards are reused",
        )
    return note
