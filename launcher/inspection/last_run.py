"""What the last job in an output folder took: it stands beside the forecast of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path

from launcher.config.job_config import JobConfig
from launcher.config.option_flags import flags_of
from launcher.config.resolve import job_config_class, job_from_yaml
from launcher.config.stored_job import with_its_paths
from launcher.files.run_folder import CONFIG
from launcher.journal.trace import Line, last_run
from quant_core.errors import ExplainedError, InputError

# A job that made a checkpoint went through all its stages; one that found it published did not.
_MADE_BY = "merge"
# Options that change neither how long a job takes nor what it holds.
_NO_MATTER = frozenset(
    {"prompt_path", "info_file_save_path", "seed", "device_id", "timeout_s", "hang_timeout", "save_path", "resume"}
    | {"quant_weight_save_folder", "quant_dump_calib_folder", "overwrite", "dry_run", "evaluate_prompts"}
    | {"min_psnr", "min_ssim", "max_flip", "min_output_sqnr", "min_layer_sqnr"}
)


@dataclass(frozen=True)
class LastRun:
    """What was measured: seconds of the slowest rank by stage, and the most bytes that a rank held.

    changed: which options the planned job has otherwise, in words; None where those of that job are not known.
    """

    day: datetime
    ranks: int
    seconds: dict[str, float]
    memory: int
    changed: list[str] | None


def last_run_in(folder: Path, config: JobConfig) -> LastRun | None:
    """Return what the last job that published in the folder took; None where none did, or its logs are gone."""
    try:
        lines = last_run(folder, _MADE_BY)
    except InputError:
        return None
    ended = [line for line in chain(*lines.values()) if line.ended]
    return LastRun(
        day=min(line.time for line in ended),
        ranks=len(lines),
        seconds=_slowest(list(lines.values())),
        memory=max(line.memory for line in ended),
        changed=_changed(folder / CONFIG, config),
    )


def _slowest(ranks: list[list[Line]]) -> dict[str, float]:
    """Return the seconds of each stage, in their order; a rank may enter one twice."""
    stages = dict.fromkeys(line.ended for lines in ranks for line in lines if line.ended)
    return {stage: max(sum(e.seconds for e in lines if e.ended == stage) for lines in ranks) for stage in stages}


def _changed(path: Path, config: JobConfig) -> list[str] | None:
    with suppress(OSError, UnicodeDecodeError, ExplainedError):
        return list(_differences(job_from_yaml(path.read_text(encoding="utf-8")), config))
    return None


def _differences(before: JobConfig, now: JobConfig) -> Iterator[str]:
    if before.model != now.model:
        yield f"{before.model}, now {now.model}"
        return
    then, planned = (with_its_paths(job.model_dump(mode="json"), Path.cwd()) for job in (before, now))
    for flag in flags_of(job_config_class(now.model)):
        a, b = (_value(tree, flag.path) for tree in (then, planned))
        if flag.path[-1] not in _NO_MATTER and a != b:
            yield f"{flag.option} {_said(a)}, now {_said(b)}"


def _value(tree: object, path: tuple[str, ...]) -> object:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(left out)" if value is None else str(value)
