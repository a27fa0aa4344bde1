"""Give any exception the four parts of an error for people."""

from __future__ import annotations

import errno
import re
import traceback

import torch

from launcher import npu
from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted

# How gloo, NCCL and torch's store say that a peer is gone or silent; they raise RuntimeError for everything.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Timed out (waiting|after)|NCCL.*(remote|timeout)"
    r"|recvValue failed|failed to (send|recv)|monitoredBarrier",
    re.IGNORECASE,
)


def explained(error: BaseException) -> ExplainedError:
    """Return the error itself if it is explained already, else one that says what its kind usually means."""
    if isinstance(error, ExplainedError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return _out_of_memory(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFailure(
            "the disk is full",
            where=str(error.filename or _place(error)),
            why=str(error),
            advice="free space, then run the same command again: finished parts are reused",
        )
    if isinstance(error, RuntimeError):
        return npu.explain(str(error)) or _lost_peer(error) or _bug(error)
    return _bug(error)


def _out_of_memory(error: BaseException) -> MemoryExhausted:
    return MemoryExhausted(
        "out of memory",
        where=_place(error),
        why=_line(error) or "the host could not give more",
        advice="use more ranks for one copy of the model (--tp_size), a smaller image, or --device cpu",
    )


def _lost_peer(error: RuntimeError) -> DistributedError | None:
    if not _LOST_PEER.search(str(error)):
        return None
    return DistributedError(
        "another rank is gone or does not answer",
        where=_place(error),
        why=_line(error),
        advice="read the other ranks' errors: the first one is the cause",
    )


def _bug(error: BaseException) -> ExplainedError:
    return ExplainedError(
        f"{type(error).__name__}: {_line(error)}",
        where=_place(error),
        why="this is a mistake of the program, not of yours",
        advice="report it with the traceback",
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
