"""Read pickled tensors without ever executing what a pickle says."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path
from typing import Any

import torch

from quant_core.errors import InputError


def safe_torch_load(path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
    """Load a torch file with `weights_only=True`.

    Raises InputError when it is missing, is no regular file, is truncated, or holds anything but plain data.
    """
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError("not a regular file", where=str(file), advice="give the path of a .pth file")
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise InputError("no such file", where=str(file), advice="dump the calibration data first") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            "the file holds objects that must not be loaded",
            where=str(file),
            why=_first_line(error),
            advice="only tensors, numbers, strings, lists and dicts are read; dump the data again",
        ) from None
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the unpickler stumble over anything: IndexError, TypeError, ...
        raise InputError(
            "the file cannot be read as torch data",
            where=str(file),
            why=_first_line(error),
            advice="it is truncated or of another kind: remove it and dump the data again",
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
