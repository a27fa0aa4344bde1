"""The checks, one row each, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.doctor.collective import try_ranks
from launcher.doctor.devices import devices
from launcher.doctor.finding import Finding
from launcher.doctor.host import disks, limits, memory, names
from launcher.doctor.packages import cann, packages, pair
from launcher.doctor.processes import left_over
from launcher.doctor.variables import variables


@dataclass(frozen=True)
class Asked:
    """Say what the person wants to know of: the folder of a job, the ranks to try, the kind of device to try them on.

    `device` is None for the first kind that has cards, else the processor.
    """

    folder: Path
    ranks: int | None = None
    device: str | None = None


Check = Callable[[Asked], Iterable[Finding]]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("packages", lambda asked: packages()),
    ("packages", lambda asked: pair()),
    ("packages", lambda asked: cann()),
    ("devices", lambda asked: devices()),
    ("host", lambda asked: memory()),
    ("host", lambda asked: limits()),
    ("host", lambda asked: names()),
    ("disks", lambda asked: disks(asked.folder)),
    ("left over", lambda asked: left_over(asked.folder)),
    ("variables", lambda asked: variables()),
    ("ranks", lambda asked: try_ranks(asked.ranks, asked.device)),
)


def examine(asked: Asked) -> Iterator[Finding]:
    """Run every check; one that fails itself is a finding too, and the others go on."""
    for section, check in CHECKS:
        try:
            found = list(check(asked))
        except Exception as error:  # the doctor is for machines on which anything may be broken
            found = [Finding("!!", section, f"could not look: {type(error).__name__}: {error}", "report it with this")]
        yield from (replace(finding, section=section) for finding in found)
