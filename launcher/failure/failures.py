"""Give any exception the four parts of an error for people, and carry it to the other ranks as plain text."""

from __future__ import annotations

import errno
import json
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from launcher.devices import kinds
from launcher.failure.exit_codes import EXIT_CODES, ExitCode, exit_code
from launcher.journal.status import format_time, write_status
from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted

# How gloo, NCCL and torch's store say that a peer is gone or silent; they raise RuntimeError for everything.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Timed out (waiting|after)|NCCL.*(remote|timeout)"
    r"|recvValue failed|failed to (send|recv)|monitoredBarrier",
    re.IGNORECASE,
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a failed write as an error of their own kind, with or without the system's words.
_FAILED_WRITE = re.compile(r"No space left|quota exceeded|File too large|PytorchStreamWriter failed", re.IGNORECASE)
_NO_HOST_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc", re.IGNORECASE)

_KINDS: dict[str, type[ExplainedError]] = {
    kind.__name__: kind for kind in EXIT_CODES if issubclass(kind, ExplainedError)
}


@dataclass(frozen=True)
class Failure:
    """Carry a rank's error to the others, as plain text; `at` is the time it happened, in seconds of the epoch."""

    rank: int
    kind: str
    what: str
    where: str
    why: str
    advice: str
    at: float

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """Describe an exception that happened on this rank just now."""
        told = explained(error)
        kind = next((name for name, kind in _KINDS.items() if isinstance(told, kind)), "")
        return cls(rank, kind, told.what, told.where, told.why, told.advice, time.time())

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the failure as a JSON object."""
        return json.dumps(asdict(self))

    def error(self) -> ExplainedError:
        """Return the error again, of the same kind and with the same text."""
        return _KINDS.get(self.kind, ExplainedError)(self.what, where=self.where, why=self.why, advice=self.advice)

    @property
    def exit_code(self) -> ExitCode:
        """The exit status of a job that ended so."""
        return exit_code(self.error())


def write_end(folder: Path, started: float, failure: Failure | None) -> None:
    """Say in `status.json` how the job ended: published, or with the failure that came first."""
    code = failure.exit_code if failure else ExitCode.PUBLISHED
    told = {**asdict(failure), "at": format_time(failure.at)} if failure else None
    write_status(folder, code.state, started, exit_code=int(code), error=told)


def explained(error: BaseException) -> ExplainedError:
    """Return the error itself if it is explained already, else one that says what its kind usually means."""
    if isinstance(error, ExplainedError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, _NO_HOST_MEMORY):
        return _out_of_memory(error)
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or _says(error, _FAILED_WRITE):
        return _disk_full(error)
    if isinstance(error, RuntimeError):
        return kinds.explain(error) or _lost_peer(error) or _bug(error)
    return _bug(error)


def place(error: BaseException) -> str:
    """Return the layer an exception passed through, if any, and the line of code it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    code = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return ", ".join(filter(None, [_layer(error), code]))


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    return isinstance(error, Exception) and words.search(str(error)) is not None


def _layer(error: BaseException) -> str:
    """Return the name of the innermost layer, as the outermost model on the way to it calls it."""
    modules = [found for found in _locals_named_self(error) if isinstance(found, torch.nn.Module)]
    names = {id(module): name for name, module in modules[0].named_modules()} if modules else {}
    return next((f"layer {names[id(found)]}" for found in reversed(modules) if names.get(id(found))), "")


def _locals_named_self(error: BaseException) -> Iterator[object]:
    for frame, _line_number in traceback.walk_tb(error.__traceback__):
        yield frame.f_locals.get("self")


def _out_of_memory(error: BaseException) -> MemoryExhausted:
    return MemoryExhausted(
        "out of memory",
        where=place(error),
        why=_line(error) or "the host could not give more",
        advice="use more ranks for one copy of the model (--tp_size), a smaller image, or --device cpu",
    )


def _disk_full(error: BaseException) -> EnvironmentFailure:
    return EnvironmentFailure(
        "the disk is full",
        where=str(getattr(error, "filename", None) or place(error)),
        why=_line(error),
        advice="free space, then run the same command again: finished parts are reused",
    )


def _lost_peer(error: RuntimeError) -> DistributedError | None:
    if not _LOST_PEER.search(str(error)):
        return None
    return DistributedError(
        "another rank is gone or does not answer",
        where=place(error),
        why=_line(error),
        advice="read the other ranks' errors: the first one is the cause",
    )


def _bug(error: BaseException) -> ExplainedError:
    return ExplainedError(
        f"{type(error).__name__}: {_line(error)}",
        where=place(error),
        why="this is a mistake of the program, not of yours",
        advice="report it with the traceback",
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
