"""EVALUATE: measure the published files against the float model, write their quality card, and judge it.

The copies of the model share the pictures (or, without pictures, the calibration data); the ranks of a copy compute the
same ones together, and the first of them keeps them. What was painted is found again after an interruption, and a card
of the same checkpoint and the same pictures is not made twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.config.job_config import Evaluation, JobConfig
from launcher.failure.phases import run_together
from launcher.files.calibration_parts import load_sound_dump
from launcher.files.digests import digest_of_file, digest_of_text
from launcher.files.fingerprint import Fingerprint
from launcher.files.identity import calibration_fingerprint
from launcher.files.manifest import Manifest, read_manifest
from launcher.files.run_folder import QUALITY, RunFolder
from launcher.ranks.agreement import gather_objects, group_agrees
from launcher.ranks.mesh import Mesh
from launcher.stages.encode import encode, prompts_of
from launcher.stages.identify import ask_first, shared_model_fields
from launcher.stages.job import Job
from model_adapters.adapter import ModelAdapter
from model_adapters.pipeline.prompts import Batch
from model_adapters.quality.card import Origin, QualityCard, read_card
from model_adapters.quality.evaluate import Published, evaluate_layers, published
from model_adapters.quality.evaluate import evaluate as evaluate_pictures
from model_adapters.quality.gate import check_quality
from model_adapters.quality.measured import Measured, card_of
from model_adapters.quality.origin import origin_of
from model_adapters.quality.painting import Painting
from model_adapters.quality.requests import evaluation_batches
from model_adapters.quality.results import CARD, SHEET, write_results
from model_adapters.quality.store import FLOAT, FLOOR, QUANTIZED, PictureStore
from model_adapters.quality.verdict import require_sound, verdict
from quant_core.calibration.records import Record, as_records, load_dump
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import ConfigurationError, InputError, VerificationError

# A copy with one batch more than another paints it three times, and replays what was recorded of it.
_LEAD = 4


@dataclass(frozen=True)
class _Subject:
    """Say what is evaluated: the checkpoint, its files, and what the pictures of all copies are.

    calibration: digest of the fingerprint that its calibration data carries. copies: of the model, that made it. found:
    the card of the very same, if an earlier run made it.
    """

    origin: Origin
    store: PictureStore
    batches: list[Batch]
    calibration: str
    copies: int
    found: QualityCard | None = None

    @property
    def card(self) -> Path:
        return self.store.folder / CARD

    def beside(self, folder: RunFolder) -> _Subject:
        """Return the same for a host that has the published files in this folder."""
        return replace(self, store=replace(self.store, folder=folder.weights / QUALITY))

    def is_of(self, card: QualityCard) -> bool:
        """Tell whether a card is of this checkpoint and these pictures."""
        wanted = [(r.number, r.prompt, self.store.seed + r.number) for batch in self.batches for r in batch]
        return card.origin == self.origin and [(p.number, p.prompt, p.seed) for p in card.pictures] == wanted


def check_evaluation(config: JobConfig, adapter: ModelAdapter) -> list[Batch]:
    """Return the pictures of all copies.

    Raises ConfigurationError for a model that makes none, and InputError for prompts that cannot be read.
    """
    options = config.evaluation
    if options.evaluate and adapter.result.suffix != ".png":
        raise ConfigurationError(
            f"{adapter.name} makes no pictures to evaluate",
            where="--evaluate",
            why=f"what it makes is kept as {adapter.result.suffix}",
            advice="--evaluate 0 compares layers and outputs only",
        )
    return evaluation_batches(config.pipeline, options.evaluate or 0, options.evaluate_prompts)


def evaluate(job: Job, folder: RunFolder) -> None:
    """Measure what is published in the folder, if the job asks for it.

    Raises VerificationError where it falls short of what was asked for, or a layer is broken.
    """
    if job.config.evaluation.evaluate is None:
        return
    job.watch.enter("evaluate")
    model = shared_model_fields(job.config, job.ranks)
    found = ask_first(job.ranks, "looking at the published checkpoint", lambda: _look(job, folder, model))
    subject = found.beside(folder)  # rank 0 told its host's path
    card = subject.found or _make_card(job, folder, subject)
    for sentence in verdict(card):
        job.console.say(f"evaluate: {sentence}")
    job.console.say(f"evaluate: {'evaluated already: ' if subject.found else ''}{subject.card}")
    if card.pictures:
        job.console.say(f"evaluate: {subject.card.with_name(SHEET)}")
    run_together(job.ranks, "judging the checkpoint", lambda: _judge(card, job.config.evaluation, str(subject.card)))


def _judge(card: QualityCard, asked: Evaluation, where: str) -> None:
    check_quality(card, asked, where=where)
    require_sound(card, where=where)


def _look(job: Job, folder: RunFolder, model: Mapping[str, Any]) -> _Subject:
    """Find out what there is to evaluate, and whether that was done already."""
    manifest = read_manifest(folder.manifest)
    assert manifest is not None, "the job has published it, or the command has read it"
    found = {file.name: _digest(folder.weights / file.name) for file in manifest.files}
    if changed := [file.name for file in manifest.files if found[file.name] != file.sha256]:
        job.console.say(f"evaluate: changed since they were published, and measured as they are: {', '.join(changed)}")
    subject = _describe(job, folder, manifest, model, digest_of_text(repr(sorted(found.items()))))
    if job.config.output.resume == "never":
        subject.store.discard()
        return subject
    if not subject.card.is_file():
        return subject
    try:
        card = read_card(subject.card)
    except InputError:
        return subject
    return replace(subject, found=card) if subject.is_of(card) else subject


def _describe(job: Job, folder: RunFolder, manifest: Manifest, model: Mapping[str, Any], checkpoint: str) -> _Subject:
    config, adapter = job.config, job.model.adapter
    batches = check_evaluation(config, adapter)
    floating = calibration_fingerprint(config, adapter, job.ranks.mesh, model, batches)
    quantized = Fingerprint({**floating.fields, "checkpoint": checkpoint})
    fingerprints = {FLOAT: floating.digest, FLOOR: floating.digest, QUANTIZED: quantized.digest}
    calibrated = {name: value for name, value in manifest.fields.items() if not name.startswith("quantization.")}
    origin = origin_of(
        adapter,
        config.pipeline,
        quant_type=config.quantization.quant_type,
        fingerprint=manifest.fingerprint,
        checkpoint=checkpoint,
    )
    store = PictureStore(folder.weights / QUALITY, fingerprints, config.pipeline.seed)
    return _Subject(origin, store, batches, Fingerprint(calibrated).digest, manifest.dp_size)


def _digest(path: Path) -> str:
    return digest_of_file(path) if path.is_file() else "missing"


def _make_card(job: Job, folder: RunFolder, subject: _Subject) -> QualityCard:
    """Measure on all ranks, and publish card and contact sheet."""
    checkpoint = run_together(job.ranks, "opening the published files", lambda: _open(job, folder))
    job.model.drop()
    measure = _measure_pictures if subject.batches else _measure_layers
    mine = measure(job, folder, subject, checkpoint)
    # It computes from the published files now, and its embeddings are those of other prompts than the job's.
    job.model.drop()
    job.model.embeddings = {}
    limit = _LEAD * job.ranks.timeout_s
    parts = gather_objects(job.ranks, mine, what="the end of the evaluation", timeout_s=limit)
    card = card_of(parts, subject.origin)
    requests = [request for batch in subject.batches for request in batch]

    def write() -> None:
        if job.ranks.rank == 0:
            write_results(subject.store.folder, card, subject.store, requests)
            subject.store.tidy(subject.batches)

    run_together(job.ranks, "writing the quality card", write)
    return card


def _open(job: Job, folder: RunFolder) -> Published:
    """Open this rank's files. Raises VerificationError for those of another rank."""
    files, rank = folder.shard(), job.ranks.mesh.tp_rank
    said = open_checkpoint(files).metadata.get("tp_rank", str(rank))
    if said != str(rank):
        raise VerificationError(
            f"the file of shard {rank} holds shard {said}",
            where=str(files.weights),
            why="its header says so: files of two ranks were swapped",
            advice="give the files their names back, or run the job again",
        )
    return published(files)


def _measure_pictures(job: Job, folder: RunFolder, subject: _Subject, checkpoint: Published) -> Measured:
    """Paint this copy's share of the pictures, with the float model and with the published files, and compare them."""
    mesh, session = job.ranks.mesh, job.model
    share = subject.batches[mesh.dp_rank :: mesh.dp_size]
    session.embeddings = {}
    encode(replace(job, batches=share))
    pipeline = run_together(job.ranks, "loading the model", session.load_exact_pipeline)
    painting = Painting(
        session.adapter,
        job.config.pipeline,
        session.adapter.dtype(job.config.pipeline),
        share,
        lambda batch: session.embeddings_of(prompts_of(batch)),
        subject.store,
        saves=mesh.tp_rank == 0,
        agree=partial(group_agrees, job.ranks.tp_control),
        after_batch=lambda kind, done, total: _progress(job, f"{kind} pictures", done, total),
    )
    return evaluate_pictures(painting, pipeline, checkpoint, progress=partial(_progress, job))


def _measure_layers(job: Job, folder: RunFolder, subject: _Subject, checkpoint: Published) -> Measured:
    """Compare layers and outputs on this copy's share of the calibration data."""
    read = partial(calibration_records, fingerprint=subject.calibration, copies=subject.copies)
    records = run_together(job.ranks, "reading the calibration data", lambda: read(folder.dumps, job.ranks.mesh))
    model = run_together(job.ranks, "loading the model", lambda: job.model.transformer).model
    dtype = job.model.adapter.dtype(job.config.pipeline)
    with job.model.computing():
        return evaluate_layers(model, checkpoint, records, dtype=dtype, progress=partial(_progress, job))


def calibration_records(folder: Path, mesh: Mesh, *, fingerprint: str, copies: int) -> Sequence[Record]:
    """Read the dumps that a checkpoint was made from, this copy's share of those of this rank's shard.

    fingerprint: of the dumps. copies: of the model, that made them, each its own for each shard. Raises InputError when
    one is missing or was changed, naming what cannot be read: nothing says whose that is.
    """
    dumps: dict[Path, Mapping[str, Any]] = {}
    unreadable: list[str] = []
    for path in sorted(folder.glob("calib_data*.pth")):
        try:
            dumps[path] = load_dump(path)["header"]
        except InputError as error:
            unreadable.append(f"; {path.name} cannot be read: {error.why or error.what}")
    wanted = {"fingerprint": fingerprint, "tp_rank": mesh.tp_rank}
    # By the copy that made it: a host may have only the dumps of its own ranks.
    own = {header["dp_rank"]: path for path, header in dumps.items() if wanted.items() <= header.items()}
    share = range(mesh.dp_rank, copies, mesh.dp_size)
    if missing := [copy for copy in share if copy not in own]:
        raise InputError(
            "there is no calibration data of this checkpoint to compare layers on",
            where=str(folder),
            why=f"of {len(dumps) + len(unreadable)} calib_data*.pth none is of shard {mesh.tp_rank} in copy "
            f"{missing[0]} of its job{''.join(unreadable)}",
            advice="--evaluate 4 makes pictures and needs none",
        )
    return [record for copy in share for record in as_records(load_sound_dump(own[copy]))]


def _progress(job: Job, stage: str, done: int, total: int) -> None:
    """Show how far the evaluation is; between two pictures or records the ranks of one copy may stop together."""
    job.watch.progress(f"evaluate: {stage}", done, total)
    job.watch.safe_point(job.ranks.tp_control)
