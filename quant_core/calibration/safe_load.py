"""Read pickled tensors without ever executing what a pickle says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from quant_core.errors import InputError
from quant_core.readable_file import require_readable


def safe_torch_load(path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
    """Load a torch file with `weights_only=True`.

    Raises InputError when it is missing, cannot be opened, is truncated, or holds anything but plain data.
    """
    file = Path(path)
    require_readable(file, kind=".pth", missing="dump the calibration data first")
    try:
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(
            "the file holds objects that must not be loaded",
            where=str(file),
            why=_first_line(error),
            advice="only tensors, numbers, strings, lists and dicts are read; dump the data again",
        ) from None
    except Exception as error:  # damaged bytes make the unpickler stumble over anything: IndexError, TypeError, ...
        raise InputError(
            "the file cannot be read as torch data",
            where=str(file),
            why=_first_line(error),
            advice="it is truncated or of another kind: remove it and dump the data again",
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
