"""What went wrong on a rank, as plain data that other ranks and processes can read; text is made when it is shown."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.failure.exit_codes import EXIT_CODES, ExitCode, exit_code
from launcher.failure.explain import explained
from launcher.journal.status import format_time, is_kept, write_status
from quant_core.errors import DistributedError, ExplainedError, FolderInUse

# The stage until the ranks have formed their groups: there is nothing to finish yet.
STARTING = "starting"
# So many characters of a traceback are kept; its message may be a whole state dict's.
_LONGEST_TRACEBACK = 20_000

_KINDS: dict[str, type[ExplainedError]] = {
    kind.__name__: kind for kind in EXIT_CODES if issubclass(kind, ExplainedError)
}


@dataclass(frozen=True)
class Failure:
    """Carry an error to the others.

    `rank` is where it happened, in `stage` ("" while nobody knows of stages); `alike` are further ranks that failed in
    the same words. `at` is the time, in seconds of the epoch. `is_frozen` says that the rank's process stands still,
    and that somebody else has to end it. `traceback` is of a mistake of the program, for its authors: the rank that
    tells of it may be another one.
    """

    rank: int
    kind: str
    what: str
    where: str
    why: str
    advice: str
    at: float
    stage: str = ""
    alike: tuple[int, ...] = ()
    is_frozen: bool = False
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, rank: int, stage: str = "") -> Failure:
        """Describe an exception that happened on this rank just now; one that came from a failure is that failure."""
        if carried := carried_by(error):
            return carried
        told = explained(error)
        kind = next((name for name, kind in _KINDS.items() if isinstance(told, kind)), "")
        trace = "" if kind else "".join(traceback.format_exception(error))[:_LONGEST_TRACEBACK]
        return cls(rank, kind, told.what, told.where, told.why, told.advice, time.time(), stage, traceback=trace)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Failure:
        """Return the failure with these fields, as `asdict` and JSON give them."""
        return cls(**{**fields, "alike": tuple(fields["alike"])})

    def brief(self) -> dict[str, Any]:
        """Return the fields without the traceback, which terminal and log show, for files that are kept small."""
        return {name: value for name, value in asdict(self).items() if name != "traceback"}

    def error(self) -> ExplainedError:
        """Return the error again, of the same kind; it remembers this failure, so that its text is never read back."""
        kind = _KINDS.get(self.kind, ExplainedError)
        told = kind(self.what, where=self.place, why=self.why, advice=self.advice)
        vars(told)["failure"] = self
        return told

    @property
    def place(self) -> str:
        """On which ranks, in which stage, and where there."""
        ranks = ", ".join(map(str, sorted([self.rank, *self.alike])))
        located = f"rank{'s' * bool(self.alike)} {ranks}, {self.stage}" if self.stage else ""
        return ": ".join(filter(None, [located, self.where]))

    @property
    def exit_code(self) -> ExitCode:
        """The exit status of a job that ended so."""
        return exit_code(self.error())

    @property
    def is_about_others(self) -> bool:
        """Whether it may be the consequence of what another rank did."""
        return self.kind == DistributedError.__name__


def carried_by(error: BaseException) -> Failure | None:
    """Return the failure that an error was made from; None for one that is raised here for the first time."""
    return vars(error).get("failure")


def write_end(folder: Path, started: float, failure: Failure | None) -> None:
    """Say in `status.json` how the job ended: published, or with the failure that came first.

    A job that was refused because another one works in its folder leaves that one's status alone.
    """
    if failure and failure.kind == FolderInUse.__name__ and is_kept(folder):
        return
    code = failure.exit_code if failure else ExitCode.PUBLISHED
    told = {**failure.brief(), "where": failure.place, "at": format_time(failure.at)} if failure else None
    write_status(folder, code.state, started, exit_code=int(code), error=told)
