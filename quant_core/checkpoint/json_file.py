"""Read a JSON file that somebody else may have written, cut short or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant_core.errors import InputError
from quant_core.readable_file import require_readable

MISSING = "check the folder's name, or quantize first"


def read_object(path: Path, *, advice: str = "quantize again, or copy it again") -> dict[str, Any]:
    """Return the JSON object in a file, keys in their order; advice: how to come by a sound file.

    Raises InputError when it is missing, unreadable, cut short, no object, or has a key twice (JSON would silently
    keep the last).
    """
    require_readable(path, kind=".json", missing=MISSING)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error), advice) from None
    if not isinstance(found, dict):
        raise _unreadable(path, f"it holds a {type(found).__name__}, not an object", advice)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{key}' is there twice")
        found[key] = value
    return found


def _unreadable(path: Path, why: str, advice: str) -> InputError:
    return InputError(
        f"{path.name} cannot be read as a JSON object",
        where=str(path),
        why=why,
        advice=f"it is truncated or of another kind: {advice}",
    )
