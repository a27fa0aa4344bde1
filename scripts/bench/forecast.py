"""Put what the memory model says of a job beside what the job took, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.bench.rows import Row
from scripts.bench.stages import Stage

# Stage of a job -> the memory model's name of its peak.
_STAGES = {"load": "loading", "calibrate": "calibrating", "quantize": "quantizing"}


def compare(row: Row, folder: Path, stages: Sequence[Stage]) -> Iterator[str]:
    """Yield a line for each stage and rank: measured above what preparing left, and forecast, in GiB."""
    forecast = _forecast(row, folder, ranks=len({stage.rank for stage in stages}))
    # What a rank has before it holds a tensor: Python, torch, diffusers, transformers.
    before = {stage.rank: stage.left_bytes for stage in stages if stage.name == "prepare"}
    for stage in stages:
        if stage.name in _STAGES:
            above = stage.peak_bytes - before[stage.rank]
            expected = forecast[_STAGES[stage.name]]
            yield (
                f"rank {stage.rank}, {stage.name}: {above / 2**30:.2f} GiB above the {before[stage.rank] / 2**30:.2f} "
                f"that preparing left, {expected / 2**30:.2f} forecast ({above / expected - 1:+.0%})"
            )


def _forecast(row: Row, folder: Path, ranks: int) -> dict[str, int]:
    from launcher.cli.command_line import parse
    from launcher.stages.processors import processors, session_of
    from model_adapters import load_adapter
    from model_adapters.memory.memory_model import estimate_memory
    from model_adapters.weights.transformer_part import describe_transformer

    path_flag = {"flux": "--path", "sd3": "--sd3_model_path"}[row.model]
    words = [row.model, path_flag, str(folder), "--device", "cpu", *row.flags]
    job = parse([*words, "--do_quant", "--quant_weight_save_folder", "w", "--quant_dump_calib_folder", "d"]).options
    options, quantization = job.pipeline, job.quantization
    adapter = load_adapter(row.model)
    part = describe_transformer(
        adapter, str(folder), tp_rank=0, tp_size=ranks, layout=None, dtype=adapter.dtype(options)
    )
    disabled = adapter.disabled_layers[quantization.main_type]
    session = session_of(processors(quantization, disabled), quantization, [])
    found = estimate_memory(adapter, part, options, session, batches=row.prompts)
    return {name: getattr(found, name) for name in _STAGES.values()}
