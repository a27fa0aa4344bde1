"""How a job ran: its stages on each rank, where each option came from, and what to type to have it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from launcher.config.option_flags import Flag, flags_of
from launcher.config.resolve import job_config_class
from launcher.config.stored_job import read_stored
from launcher.files.run_folder import CONFIG
from launcher.journal.trace import Line, last_run, moment
from quant_core.errors import InputError

# A run that did this made the checkpoint; later ones found it published already.
_MADE_BY = "merge"


class StageRow(BaseModel):
    """One stage on one rank: seconds since the job began, how long, and the most bytes that the rank held."""

    rank: int
    stage: str
    begin: float
    seconds: float
    memory: int


class OptionRow(BaseModel):
    """An option as it was resolved, and where its value came from: the command line, a file, or the default."""

    flag: str
    value: str
    origin: str


def stage_rows(folder: Path, world: int) -> list[StageRow]:
    """Return the stages of the run that published, by rank and time; none where its logs are gone.

    world: its number of ranks; a larger run before it may have left logs of others.
    """
    ranks = {rank: lines for rank, lines in _run(folder).items() if rank < world}
    start = min((moment(lines[0]) for lines in ranks.values()), default=0.0)
    return [
        StageRow(
            rank=rank,
            stage=line.ended,
            begin=round(max(0.0, moment(line) - line.seconds - start), 3),
            seconds=line.seconds,
            memory=line.memory,
        )
        for rank, lines in ranks.items()
        for line in lines
        if line.ended is not None
    ]


def option_rows(folder: Path) -> tuple[list[OptionRow], str]:
    """Return the options of the job, and the name of its model; empty where the job's configuration is gone."""
    path = folder / CONFIG
    if not path.exists():
        return [], ""
    tree = read_stored(path)
    model, words = str(tree["model"]), _words(folder)
    return [_option(flag, tree, words) for flag in flags_of(job_config_class(model))], model


def command(folder: Path, model: str, world: int) -> str:
    """Return what to type to run the job again, on so many ranks, from the same folder; empty where no model is known.

    model: what `option_rows` returned.
    """
    if not model:
        return ""
    words = _words(folder)
    if not words:
        words = [model, "--config", str(folder / CONFIG)]
    start = "python" if world == 1 else f"torchrun --nproc_per_node {world}"
    return f"{start} -m launcher {shlex.join(words if words[0] == model else [model, *words])}"


def _option(flag: Flag, tree: Mapping[str, Any], words: Sequence[str]) -> OptionRow:
    value: Any = tree
    for name in flag.path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return OptionRow(flag=flag.option, value=_shown(value), origin=_origin(flag, value, words))


def _origin(flag: Flag, value: Any, words: Sequence[str]) -> str:
    if any(word.partition("=")[0] == flag.option for word in words):
        return "command line"
    if _shown(value) == _shown(_default(flag)):
        return "default"
    config = next(_values(words, "--config"), None)
    return f"--config {config}" if config else "given"


def _default(flag: Flag) -> Any:
    """Return the default as an option of that type holds it: a path has lost its `./`."""
    return Path(flag.default) if Path in flag.kinds and flag.default is not None else flag.default


def _values(words: Sequence[str], option: str) -> Iterator[str]:
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name == option:
            yield value if equals else following


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _words(folder: Path) -> list[str]:
    """Return what was typed behind `launcher`, as the first rank logged it."""
    lines = next(iter(_run(folder).values()), [])
    return next((list(line.words) for line in lines if line.words), [])


def _run(folder: Path) -> dict[int, list[Line]]:
    with suppress(InputError):
        return last_run(folder, _MADE_BY)
    return {}
