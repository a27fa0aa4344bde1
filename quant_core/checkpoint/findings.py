"""What a check found in a file, and rules as data: a name, what must hold, and who looks for what breaks it.

A table of rules looks at one subject (the tensors of a layer, a path, all ranks). Every rule of a table is asked, so
that a person learns of everything that is wrong and not of the first of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from quant_core.errors import VerificationError

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """Say what breaks which rule: in which file, and of a tensor (or a layer) which one; "" for the whole file."""

    rule: str
    file: Path
    tensor: str
    what: str
    why: str

    def error(self) -> VerificationError:
        """Return the finding as the error of whoever stops at the first."""
        return VerificationError(
            self.what, where=str(self.file), why=self.why, advice="quantize again, or copy the files again"
        )


class Broken(NamedTuple):
    """What a rule objects to: the file, unless the caller knows it, the tensor, and what is wrong, in words."""

    tensor: str
    what: str
    file: Path | None = None


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """A rule: its name, why it must hold (for a reader), and what finds everything in a subject that breaks it."""

    name: str
    why: str
    broken: Callable[[Subject], Iterable[Broken]]


def check(rules: Iterable[Rule[Subject]], subject: Subject, file: Path) -> Iterator[Finding]:
    """Yield everything in a subject that breaks some of the rules; file: where the subject lies."""
    for rule in rules:
        for found in rule.broken(subject):
            yield Finding(rule.name, found.file or file, found.tensor, found.what, rule.why)
