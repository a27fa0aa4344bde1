"""QUANTIZE: turn this rank's part of the model and its dump into a staged shard.

Ranks that hold the same shard (data parallel) all compute it from their share of the records, with statistics reduced
over them, and the first writes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.config.job_config import AUTO, Quantization
from launcher.devices.host_memory import fits_in_memory
from launcher.failure.phases import run_together
from launcher.files.shard_checks import check_contract
from launcher.files.shard_note import equal_on_all_ranks, read_note, write_note
from launcher.ranks.agreement import all_agree
from launcher.stages.choose import choose
from launcher.stages.job import Job, Results
from launcher.stages.processors import processors, session_of
from launcher.stages.restep import SCHEDULER_KEY
from model_adapters.parallel.tensor_parallel import assert_collectives
from model_adapters.pipeline.noise_levels import noise_levels, scheduler_settings
from model_adapters.weights.loading import LoadedTransformer
from model_adapters.weights.passing_read import PassingRead
from model_adapters.weights.stored_tensor import Reading
from model_adapters.weights.transformer_part import TransformerPart
from quant_core.calibration.measured import Measured
from quant_core.calibration.records import load_dump
from quant_core.checkpoint.resampling import SIGMAS_KEY
from quant_core.checkpoint.tensor_file import WrittenDigests
from quant_core.errors import InputError
from quant_core.parallel.groups import Parallel
from quant_core.parallel.sharding import Shard
from quant_core.reused_memory import ReusedMemory
from quant_core.schemes import QUANT_TYPES
from quant_core.session.config import SaveProcessorConfig, SessionConfig
from quant_core.session.quantize import QuantizedModel, quant_model
from quant_core.session.streaming import quantize_streaming

# Stages that go from layer to layer, each a moment: a rank that waited for the others behind each would wait as long
# as it works, because one reads from the disk what the next one finds in the system's cache.
_BY_LAYER = ("quantize", "weights", "derive")
_LAYERS_AT_ONCE = 8


def quantize(job: Job, results: Results, dump: Path | None, ranges: Path | None = None) -> None:
    """Stage this rank's shard, or leave a finished one of the same job where it is.

    dump: this rank's calibration data, to be replayed unless there are ranges; a scheme that reads no activations
    needs neither of them nor the model in memory.
    """
    job.watch.enter("quantize")
    mine = run_together(job.ranks, "looking at the shards", lambda: _is_staged(job, results))
    is_reused = all_agree(job.ranks, mine, what="whether to quantize")
    if is_reused:
        job.console.say(f"quantize: reusing {results.folder.staged().weights}")
    else:
        _stage(job, results, ranges or dump)
    # Each rank looks at its own, all at the same time; merging then publishes without reading anything.
    run_together(job.ranks, "checking what was staged", lambda: _check(job, results, with_values=is_reused))


def _stage(job: Job, results: Results, data: Path | None) -> None:
    digests = WrittenDigests()
    if data is not None and job.model.reads_activations:
        result, part, decisions = _in_memory(job, results, data, digests)
    else:
        result, part, decisions = *_from_disk(job, results, digests), ""
    run_together(job.ranks, "noting what was staged", lambda: _note(job, results, result, part, digests, decisions))
    types = Counter(layer.scheme.quant_type for layer in result.layers.values())
    job.console.say("quantize: " + ", ".join(f"{count} layers as {kind}" for kind, count in types.items()))
    for reason, count in Counter(result.unrotated.values()).items():
        job.console.say(f"quantize: values of {count} attentions are not rotated: {reason}")


def quant_type(job: Job) -> str:
    """Return the type of the checkpoint that this job publishes, which its files are named after."""
    return QUANT_TYPES[job.config.quantization.main_type].scheme.name


def _in_memory(
    job: Job, results: Results, data: Path, digests: WrittenDigests
) -> tuple[QuantizedModel, LoadedTransformer, str]:
    """Quantize this rank's part of the model from calibration data or ranges; the text says what was chosen."""
    loaded = run_together(job.ranks, "loading the model", lambda: job.model.transformer)
    records = run_together(job.ranks, "reading the calibration data", lambda: _calib_data(job, data, results))
    job.model.drop_pipeline()
    digests.wanted = _equal_on_all_ranks(job, loaded)
    parallel, options, decisions = parallel_of(job, loaded.shards), job.config.quantization, ""

    def progress(stage: str, done: int, total: int) -> None:
        _progress(job, stage, done, total)

    def measuring(stage: str, done: int, total: int) -> None:
        _progress(job, stage, done, total, of="choose")

    if options.is_auto or options.timestep_sep == AUTO:
        options, decisions = choose(job, loaded, _session(job, options, records), parallel, measuring)
        job.watch.enter("quantize")
    with job.model.computing():
        result = quant_model(
            loaded.model,
            _session(job, options, records, *_saves(job, results)),
            structure=job.model.adapter.structure,
            parallel=parallel,
            progress=progress,
            digests=digests,
            checked=True,
        )
    assert_collectives(loaded.model)
    return result, loaded, decisions


def _calib_data(job: Job, data: Path, results: Results) -> list[Any] | Measured:
    """Load this job's records or ranges; where nothing can be locked, another job may have put its own there."""
    online = job.model.is_online
    loaded = load_dump(data)
    owner = results.quantization if online else results.calibration
    if loaded["header"].get("fingerprint") != owner.digest:
        raise InputError(
            "the calibration data is another job's",
            where=str(data),
            why="a job with other options replaced it while this one ran",
            advice="give each job its own --quant_dump_calib_folder, and run this one again",
        )
    return Measured(**loaded["records"][0]) if online else loaded["records"]


def _from_disk(job: Job, results: Results, digests: WrittenDigests) -> tuple[QuantizedModel, TransformerPart]:
    """Quantize this rank's part of the model layer by layer, without holding it."""
    job.model.drop()
    part = run_together(job.ranks, "looking at the model", job.model.describe)
    digests.wanted = _equal_on_all_ranks(job, part)
    how = Reading(ReusedMemory().empty, None if fits_in_memory(part.stored_bytes) else PassingRead())
    result = quantize_streaming(
        part.model,
        partial(part.read, how=how),
        _session(job, job.config.quantization, [], *_saves(job, results)),
        structure=job.model.adapter.structure,
        parallel=parallel_of(job, part.shards),
        device=job.ranks.device,
        progress=lambda stage, done, total: _progress(job, stage, done, total),
        digests=digests,
        checked=True,
    )
    return result, part


def _progress(job: Job, stage: str, done: int, total: int, *, of: str = "quantize") -> None:
    """Show how far the quantizer is; between two records, or some layers, the ranks of one copy may stop together."""
    job.watch.progress(f"{of}: {stage}", done, total)
    if stage not in _BY_LAYER or done % _LAYERS_AT_ONCE == 0:
        job.watch.safe_point(job.ranks.tp_control)


def _session(
    job: Job, options: Quantization, records: list[Any] | Measured, *saves: SaveProcessorConfig
) -> SessionConfig:
    """Say in the quantizer's words what the options ask for."""
    return session_of([*processors(options, job.model.disabled_layers), *saves], options, records)


def _saves(job: Job, results: Results) -> Iterator[SaveProcessorConfig]:
    """Say where the shard is staged; only the first copy of the model writes one."""
    if not _writes(job):
        return
    files = results.folder.staged()
    yield SaveProcessorConfig(
        output_path=str(files.weights.parent),
        safetensors_name=files.weights.name,
        json_name=files.description.name,
        metadata={
            "format": "pt",
            "fingerprint": results.quantization.digest,
            "layout": job.model.layout,
            "tp_rank": str(job.ranks.mesh.tp_rank),
            "tp_size": str(job.ranks.mesh.tp_size),
            **_noise_levels(job),
        },
    )


def _noise_levels(job: Job) -> dict[str, str]:
    """Say in the header at which noise levels the rows of steps are, so that rows of other steps follow from them."""
    options = job.config.pipeline
    if not any(scheme.per_step for scheme in job.config.quantization.schemes) or not job.model.adapter.set_timesteps:
        return {}
    settings = scheduler_settings(options.path)
    levels = noise_levels(job.model.adapter, settings, options, options.infer_steps)
    if levels is None:
        return {}
    return {SIGMAS_KEY: json.dumps(levels), SCHEDULER_KEY: json.dumps(settings)}


def _equal_on_all_ranks(job: Job, part: TransformerPart | LoadedTransformer) -> Callable[[str, Tensor], bool]:
    are_global = job.config.quantization.scale_sync == "global"
    return equal_on_all_ranks(part.shards, part.full_shapes, scales_are_global=are_global)


def _note(
    job: Job,
    results: Results,
    result: QuantizedModel,
    part: TransformerPart | LoadedTransformer,
    digests: WrittenDigests,
    decisions: str,
) -> None:
    if _writes(job):
        write_note(
            results.folder,
            results.quantization,
            result,
            part,
            layout=job.model.layout,
            digests=digests,
            job=job.asked.to_yaml(),
            decisions=decisions,
        )


def _check(job: Job, results: Results, *, with_values: bool) -> None:
    """Hold this rank's shard against the consumer's rules; an interrupted merge may have moved it to its place already.

    with_values: read it, too. One that this run made had its values checked before they were written.
    """
    if _writes(job) and (note := read_note(results.folder.note())):
        check_contract(note.files(results.folder.weights), with_values=with_values)


def _writes(job: Job) -> bool:
    return job.ranks.mesh.dp_rank == 0


def _is_staged(job: Job, results: Results) -> bool:
    """Tell whether this rank's shard of this very job is complete already; ranks that write none say yes."""
    if not _writes(job):
        return True
    if job.config.output.resume == "never":
        return False
    note = read_note(results.folder.note())
    return (
        note is not None and note.fingerprint == results.quantization.digest and note.is_whole(results.folder.weights)
    )


def parallel_of(job: Job, shards: Mapping[str, Shard]) -> Parallel:
    """Return this rank's place in the quantizer's words."""
    mesh = job.ranks.mesh
    return Parallel(
        shards=shards,
        tp_group=job.ranks.tp_control if mesh.tp_size > 1 else None,
        dp_group=job.ranks.dp_control if mesh.dp_size > 1 else None,
        scale_sync=job.config.quantization.scale_sync,
    )
