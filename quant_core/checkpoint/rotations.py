"""How a checkpoint says in the header of its tensors how layers were rotated, so that nobody takes them for others.

The runtime needs no word of it: rotated layers compute what they always did, together. Levels are a few characters for
each channel of each layer, about 1 MB for FLUX.1-dev.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from quant_core.arithmetic.rotation import Rotation, is_rotatable

ROTATIONS_KEY = "rotated_values"
_ROTATIONS = TypeAdapter(dict[str, Rotation])


def said_of_rotations(rotations: Mapping[str, Rotation]) -> dict[str, str]:
    """Return what the header says: nothing where nothing was rotated."""
    return {ROTATIONS_KEY: _ROTATIONS.dump_json(dict(rotations), exclude_none=True).decode()} if rotations else {}


def read_rotations(metadata: Mapping[str, str]) -> dict[str, Rotation] | None:
    """Return how each rotated layer changed, by the header; None for a text that nothing follows from."""
    try:
        found = _ROTATIONS.validate_json(metadata.get(ROTATIONS_KEY, "{}"))
    except ValidationError:
        return None
    return found if all(is_rotatable(rotation.head_size) for rotation in found.values()) else None
