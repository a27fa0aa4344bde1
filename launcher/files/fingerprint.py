"""Tell two jobs apart: what a result depends on, as fields with values, and one digest over all of them.

A dump or a shard carries the fields of the job that made it. Another job may use it only if the fields are the same,
and if they are not, the error names the first that differs and both values, because "another fingerprint" helps
nobody.

Worked example: a dump made from 24 prompts, a job with 32. The digests differ; the fields say
`prompts.count: 24 -> 32`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.files.digests import digest_of_text

# Changes with what the fields mean, and with what becomes of them before quantizing: noise, embeddings, dumps.
SCHEMA = 3


@dataclass(frozen=True)
class Fingerprint:
    """Hold what a result depends on: flat fields of plain values."""

    fields: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return the sha256 over the fields in canonical JSON."""
        canonical = json.dumps({"schema": SCHEMA, **self.fields}, sort_keys=True, separators=(",", ":"))
        return digest_of_text(canonical)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return `field: theirs -> ours` for every field that differs from another job's fields."""
        names = sorted({*self.fields, *other})
        return [
            f"{name}: {other.get(name, '(absent)')} -> {self.fields.get(name, '(absent)')}"
            for name in names
            if other.get(name) != self.fields.get(name)
        ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
