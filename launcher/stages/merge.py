"""MERGE: check all shards against each other, move them to their final names, and write the manifest last.

A manifest that is there vouches for what lies beside it, so an old one goes before the first file is replaced: an
interruption leaves either the old checkpoint with its manifest, or no manifest and shards that a second run or
`launcher merge` publishes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from launcher.config.layer_schemes import read_layer_schemes
from launcher.failure.phases import run_together
from launcher.files.digests import move
from launcher.files.folder_lock import hold
from launcher.files.manifest import Manifest, read_manifest
from launcher.files.run_folder import (
    CONFIG,
    DECISIONS,
    MANIFEST,
    QUALITY,
    REPORT,
    SMOOTHED,
    STAGING,
    note_file,
    staged_files,
    tp_suffix,
)
from launcher.files.shard_checks import OpenedShard, check_contract, check_shards
from launcher.files.shard_note import ShardNote, read_note
from launcher.stages.job import Job, Results
from model_adapters.quality.results import CARD, SHEET
from model_adapters.quality.store import QUANTIZED
from quant_core.atomic_file import write_text_atomically
from quant_core.errors import ConfigurationError, InputError

_NOTES = "quant_shard_note_*.json"


def merge(job: Job, results: Results) -> None:
    """Publish the shards that all ranks staged; rank 0 works, the others learn how it went."""
    job.watch.enter("merge")

    def publish() -> Manifest | None:
        if job.ranks.rank != 0:
            return None
        names = [results.folder.note(tp_rank) for tp_rank in range(job.ranks.mesh.tp_size)]
        return publish_shards(results.folder.weights, names, trusted=True, job=job.asked.to_yaml())

    manifest = run_together(job.ranks, "merging", publish)
    if manifest is not None:
        say_published(results.folder.weights, manifest, job.console.say)


def merge_files(folder: Path, quant_type: str | None = None) -> None:
    """Publish the shards that an earlier run left staged in a folder, of the only job there or of a chosen type."""
    if not (folder / STAGING).is_dir():
        raise _not_one(folder, {})
    with hold(folder, "folder", uuid4().hex):
        notes = [note for path in sorted((folder / STAGING).glob(_NOTES)) if (note := read_note(path))]
        chosen = [note for note in notes if quant_type is None or _is_of_type(note, quant_type)]
        found = {(note.quant_type.lower(), note.tp_size): note for note in chosen}
        if len(found) != 1:
            raise _not_one(folder, found)
        [(scheme, size)] = found
        names = [note_file(folder / STAGING, scheme, tp_suffix(rank, size)) for rank in range(size)]
        say_published(folder, publish_shards(folder, names), print)


def _not_one(folder: Path, found: Collection[tuple[str, int]]) -> InputError:
    jobs = [f"{scheme} ({size} rank{'s' * (size > 1)})" for scheme, size in sorted(found)]
    several_types = len({scheme for scheme, _ in found}) > 1
    choose = "choose one with --quant_type" if several_types else "run the one that you want: it publishes by itself"
    return InputError(
        f"there are shards of {' and '.join(jobs)}" if jobs else "there are no staged shards to merge",
        where=str(folder / STAGING),
        why="merging takes the shards of one job, which its ranks stage before they publish",
        advice=choose if jobs else "run the job (published shards need no merge)",
    )


def _is_of_type(note: ShardNote, chosen: str) -> bool:
    """Compare with the type of the checkpoint, and with that of the job: one checkpoint type serves several."""
    return chosen in (note.quant_type.lower(), note.fields.get("quantization.quant_type"))


def publish_shards(folder: Path, note_paths: list[Path], *, trusted: bool = False, job: str = "") -> Manifest:
    """Check the noted shards and publish them in the folder, in the place of what was published there.

    Returns the manifest. Shards of other types that are staged beside them stay. trusted: each rank of this run has
    just checked its shard, so nobody reads them all again. job: the options, where they are those of a later run of the
    same job than staged the shards.

    Raises InputError for shards that are missing or damaged, VerificationError for shards that break a rule or do not
    fit together.
    """
    notes = [_require(path, folder, trusted) for path in note_paths]
    check_shards([OpenedShard.of(note, folder) for note in notes])
    for note in notes if not trusted else ():
        check_contract(note.files(folder))
    manifest = Manifest.of(notes)
    _withdraw(folder, manifest)
    for note in notes:
        files = note.files(folder)
        for path in (files.weights, files.description):
            move(path, folder / path.name)
    told = {CONFIG: job or notes[0].job, DECISIONS: notes[0].decisions, SMOOTHED: notes[0].smoothed}
    for name, text in told.items():
        if text:
            write_text_atomically(folder / name, text)
    manifest.write(folder / MANIFEST)
    # Also what a job of this type on another number of ranks left: nobody could tell its shards from later ones.
    for path in staged_files(folder / STAGING, manifest.quant_type.lower()):
        path.unlink()
    with suppress(OSError):  # it holds another job's shards
        (folder / STAGING).rmdir()
    return manifest


def _withdraw(folder: Path, new: Manifest) -> None:
    """Remove a published checkpoint's manifest, what tells of its job, and the files that no new ones replace.

    What was found of it goes, too, unless the new one is the same job's; decisions stay where the new one was made from
    them: `auto` invites to edit its file where it stands.

    A damaged manifest names nothing that could be removed.
    """
    try:
        old = read_manifest(folder / MANIFEST)
    except InputError:
        old = None
    if old and old.fingerprint != new.fingerprint:  # while it can be told: the manifest goes next
        _forget_findings(folder)
    for name in (MANIFEST, CONFIG, SMOOTHED, *(() if _made_from(folder / DECISIONS, new) else (DECISIONS,))):
        (folder / name).unlink(missing_ok=True)
    keep = {file.name for file in new.files}
    for file in old.files if old else []:
        # Its names may be a stranger's: only what lies beside it is removed.
        if file.name not in keep and Path(file.name).name == file.name:
            (folder / file.name).unlink(missing_ok=True)


def _made_from(decisions: Path, new: Manifest) -> bool:
    """Tell whether a checkpoint's job has all rules that a file holds, as `--layer_schemes @FILE` gives them to it."""
    try:
        rules = read_layer_schemes([f"@{decisions}"])
    except ConfigurationError:
        return False
    return bool(rules) and all(list(rule) in new.fields.get("quantization.layer_schemes", ()) for rule in rules.items())


def _forget_findings(folder: Path) -> None:
    """Remove the quality card and the report of a checkpoint; the float model's pictures may serve the next one."""
    for name in (f"{QUALITY}/{CARD}", f"{QUALITY}/{SHEET}", *REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / QUALITY / QUANTIZED, ignore_errors=True)


def say_published(folder: Path, manifest: Manifest, say: Callable[[str], object]) -> None:
    """Say what was published, and what the user of a per-step checkpoint still has to do."""
    say(f"merge: {len(manifest.files)} files and {MANIFEST} in {folder}")
    policy = manifest.timestep_policy
    if policy is not None and not policy.registration:
        say("runtime: nothing to register, as every step runs dynamic")
    elif policy is not None:
        say(f"runtime: register steps {policy.timestep_sep} to {policy.timesteps - 1} as static, or all run dynamic:")
        for version, line in policy.registration.items():
            say(f"  MindIE-SD {version}: {line}")


def _require(path: Path, folder: Path, trusted: bool) -> ShardNote:
    note = read_note(path)
    if note is None or not note.is_whole(folder, trusted=trusted):
        raise InputError(
            "a shard is missing or damaged" if note else "a rank has not finished its shard",
            where=str(path),
            why="the files do not have the content that the rank noted" if note else "it left no note",
            advice="run the job's own command, not `merge`: it makes what is missing",
        )
    return note
