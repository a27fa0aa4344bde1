"""Say what failed so that the person who reads it can act.

Every error meant for a person has four parts and prints as four lines:

    error: no layer matches 'conext_embedder'
      where  --disable_names, model FluxTransformer2DModel (504 linear layers)
      why    a pattern must match at least one layer, so that a typo cannot change what is quantized
      try    context_embedder (nearest name), or drop the flag

The class says the kind; which exit code a kind becomes is the launcher's business.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExplainedError(Exception):
    """Carry what failed, where (rank, layer, file, field), why, and what to try next."""

    def __init__(self, what: str, *, where: str = "", why: str = "", advice: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.advice = what, where, why, advice

    def __str__(self) -> str:
        labelled = (("where", self.where), ("why", self.why), ("try", self.advice))
        lines = [f"error: {_line(self.what)}", *(f"  {label:<6} {_line(text)}" for label, text in labelled if text)]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.advice)


def _line(text: str) -> str:
    """Return the text on one line: parts of it may come from a file, with line breaks or terminal codes in them."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _rebuild(kind: type[ExplainedError], what: str, where: str, why: str, advice: str) -> ExplainedError:
    return kind(what, where=where, why=why, advice=advice)


class ConfigurationError(ExplainedError, ValueError):
    """The job as asked for makes no sense: a flag, a key, a combination."""


class EnvironmentFailure(ExplainedError):
    """The machine lacks something: a device, a driver, a package, a rank variable."""


class InputError(ExplainedError):
    """A file or tensor that was given is missing, incomplete, unsafe or of another kind."""


class MemoryExhausted(ExplainedError):
    """The device or the host ran out of memory."""


class DistributedError(ExplainedError):
    """Another rank failed, vanished, hangs or disagrees."""


class FolderInUse(DistributedError):
    """Another job works in a folder that this one needs."""


class VerificationError(ExplainedError):
    """What was produced is not what the consumer loads."""


def few(items: Iterable[str], *, between: str = "; ", shown: int = 3) -> str:
    """Return the first of many on one line, and how many more there are."""
    known = list(items)
    rest = [f"and {len(known) - shown} more"] if len(known) > shown else []
    return between.join([*known[:shown], *rest])


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `name`, or None when none is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return found[0] if found else None


def suggestion(name: str, candidates: Iterable[str], otherwise: str | None = None) -> str:
    """Return as advice the candidate most like `name`, else `otherwise`, else all candidates."""
    known = list(candidates)
    close = nearest(name, known)
    return f"{close} (nearest name)" if close else otherwise or f"one of {', '.join(known)}"
