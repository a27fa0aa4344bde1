"""The job that is stored beside a checkpoint: its relative paths are those of the folder where it was started.

A path that is not there any more stays as it is, and means the current folder as it always did: the whole may have
been moved. A model's name on the hub is no path, and is not there either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.yaml_text import parse_yaml
from quant_core.errors import InputError

# The key beside the sections, which is no option: `--config` means paths of the current folder.
STARTED_IN = "started_in"
# The options that lead to what a checkpoint was made from.
_READ = {
    "pipeline": ("path", "transformer", "lora", "prompt_path"),
    "output": ("quant_dump_calib_folder",),
    "evaluation": ("evaluate_prompts",),
}


def read_stored(path: Path) -> dict[str, Any]:
    """Return the options of the job in a file; raises InputError where it says none, and OSError as reading does."""
    tree = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    if "model" not in tree:
        raise InputError(
            "the job that made the checkpoint is not known",
            where=str(path),
            why="the file names no model, so it was emptied or changed",
            advice="put it back, or run the job again, which writes it",
        )
    return tree


def with_its_paths(tree: Mapping[str, Any], folder: object = None) -> dict[str, Any]:
    """Return the options of a stored job, which say its folder themselves if it is not given, usable from anywhere."""
    options = {name: value for name, value in tree.items() if name != STARTED_IN}
    base = folder or tree.get(STARTED_IN)
    if base is None:
        return options
    for section, names in _READ.items():
        given = options.get(section)
        if isinstance(given, Mapping):
            found = {name: _in(Path(str(base)), given[name]) for name in names if given.get(name)}
            options[section] = {**given, **found}
    return options


def _in(base: Path, given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [_in(base, each) for each in given]
    file = str(given).rpartition(":")[0]  # a LoRA file with its scale
    is_there = (base / str(given)).exists() or (file and (base / file).is_file())
    return str(base / str(given)) if is_there else given
