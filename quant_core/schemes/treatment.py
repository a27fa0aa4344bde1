"""What becomes of one layer, as it is written: a scheme or `float`, with or without outlier suppression."""

from __future__ import annotations

from typing import NamedTuple

FLOAT = "float"
# Behind a scheme: without outlier suppression, although there is one.
PLAIN = ":plain"


class Treatment(NamedTuple):
    """Say what becomes of a layer: a scheme's name or `float`, and whether outlier suppression may change it."""

    scheme: str
    smoothed: bool = False

    @classmethod
    def of(cls, text: str) -> Treatment:
        """Read it as it is written: `w8a8`, `w8a8:plain`, `float`."""
        return cls(text.removesuffix(PLAIN), smoothed=not text.endswith(PLAIN) and text != FLOAT)

    def __str__(self) -> str:
        return self.scheme if self.smoothed or self.scheme == FLOAT else self.scheme + PLAIN
