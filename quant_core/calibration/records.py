"""Calibration records: the inputs of one forward of the model, and the file that holds many of them.

A dump is the contract between calibrating and quantizing. It is one torch file of plain data:

    format, version   what the file is
    header            whatever the job says of itself, plain data: its fingerprint, prompts, ranks
    complete          True, written last: a dump without it was cut short
    records           list of {tag, timestep_idx, module_name, args, kwargs}

Equal tensors are one tensor in memory and therefore one storage in the file: the prompt embeddings of a fifty-step
loop stand there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quant_core.atomic_file import write_atomically
from quant_core.calibration.safe_load import safe_torch_load
from quant_core.errors import InputError

FORMAT = "dit-calibration"
VERSION = 1


@dataclass(frozen=True)
class Record:
    """Hold the inputs of one forward, and the denoising step it belongs to (None when unknown)."""

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


def as_records(calib_data: Any) -> list[Record]:
    """Return the records in calibration data of any accepted form, in their order.

    Accepted: a dump as loaded, a list of positional argument lists, a list of mappings with `args`, `kwargs` and
    `timestep_idx`. Raises InputError naming the entry that is none of them.
    """
    if calib_data is None:
        return []
    if isinstance(calib_data, Mapping):
        calib_data = _checked_dump(calib_data, "calib_data")["records"]
    if not isinstance(calib_data, (list, tuple)):
        raise _not_records(f"calib_data is a {type(calib_data).__name__}")
    return [_as_record(index, entry) for index, entry in enumerate(calib_data)]


def save_dump(path: Path, records: Sequence[Any], header: Mapping[str, Any]) -> Path:
    """Publish records and their header as one file, whole or not at all."""
    dump = {"format": FORMAT, "version": VERSION, "header": dict(header), "records": list(records), "complete": True}

    def write(temporary: Path) -> None:
        # Through an open file: torch would write the temporary's name into the archive, and bytes would differ.
        with temporary.open("wb") as file:
            try:
                torch.save(dump, file)
            except RuntimeError as error:
                # torch's archive writer covers the file's own error, a full disk say, with one of its own.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    return write_atomically(path, write)


def load_dump(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """Load a whole dump on the CPU, tensors mapped from the file.

    Raises InputError when it is unreadable, of another format or version, or incomplete.
    """
    return _checked_dump(safe_torch_load(path, map_location="cpu", mmap=mmap), str(path))


def _checked_dump(dump: Any, where: str) -> dict[str, Any]:
    if not isinstance(dump, Mapping) or dump.get("format") != FORMAT:
        raise _not_records("it does not say that it is one", where)
    if dump.get("version") != VERSION:
        raise _not_records(f"its version is {dump.get('version')}, this program reads version {VERSION}", where)
    if dump.get("complete") is not True or not isinstance(dump.get("records"), list):
        raise _not_records("it was not finished", where)
    if not isinstance(dump.get("header"), Mapping):
        raise _not_records("it has no header", where)
    return dict(dump)


def _as_record(index: int, entry: Any) -> Record:
    if isinstance(entry, Record):
        return entry
    # A mapping with neither would be a call without arguments, and is more likely a call's keyword arguments.
    if isinstance(entry, Mapping) and not entry.keys().isdisjoint(("args", "kwargs")):
        args, kwargs, step = entry.get("args"), entry.get("kwargs"), entry.get("timestep_idx")
        args, kwargs = () if args is None else args, {} if kwargs is None else kwargs
        if isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping) and _is_step(step):
            is_twice = "module_name" in entry and _same_call(args, kwargs)
            return Record(() if is_twice else args, kwargs, step)
    if isinstance(entry, (list, tuple)):
        return Record(entry)
    wanted = "a sequence args, a mapping kwargs and timestep_idx, a whole number or None"
    raise _not_records(f"entry {index} is a {type(entry).__name__}, not one with {wanted}")


def _is_step(step: Any) -> bool:
    return step is None or (isinstance(step, int) and step >= 0)


def _same_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether args and kwargs are one call written twice, as the reference tool's timestep records are."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    named = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    are_same = len(tensors) == len(named) and all(a is b for a, b in zip(tensors, named))
    return len(args) == len(kwargs) and bool(tensors) and are_same


def _not_records(why: str, where: str = "calib_data") -> InputError:
    return InputError(
        "this is no calibration dump",
        where=where,
        why=why,
        advice="dump it again with DumperManager (or remove the file and run the job again)",
    )
