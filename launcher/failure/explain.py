"""Give any exception the four parts of an error for people."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator

from launcher.devices import kinds
from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted

# How gloo, NCCL and torch's store say that a peer is gone or silent; they raise RuntimeError for everything.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Timed out (waiting|after)|NCCL.*(remote|timeout)"
    r"|recvValue failed|failed to (send|recv)|monitoredBarrier",
    re.IGNORECASE,
)
# What a file or folder answers that cannot be used as it was meant: its rights, its kind, its name, its disk.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ESTALE, errno.EIO),
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a failed write as an error of their own kind, with or without the system's words.
_FAILED_WRITE = re.compile(r"No space left|quota exceeded|File too large|PytorchStreamWriter failed", re.IGNORECASE)
_NO_HOST_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc", re.IGNORECASE)


def explained(error: BaseException) -> ExplainedError:
    """Return the error itself if it is explained already, else one that says what its kind usually means."""
    if isinstance(error, ExplainedError):
        return error
    import torch  # not above: an error in the words of a command is told before it is there

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, _NO_HOST_MEMORY):
        return _out_of_memory(error)
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or _says(error, _FAILED_WRITE):
        return _disk_full(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _UNUSABLE:
        return _unusable(error)
    if isinstance(error, RuntimeError):
        return kinds.explain(error) or _lost_peer(error) or _bug(error)
    return _bug(error)


def _place(error: BaseException) -> str:
    """Return the layer an exception passed through, if any, and the line of code it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    code = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return ", ".join(filter(None, [_layer(error), code]))


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    return isinstance(error, Exception) and words.search(str(error)) is not None


def _layer(error: BaseException) -> str:
    """Return the name of the innermost layer, as the outermost model on the way to it calls it."""
    import torch

    modules = [found for found in _locals_named_self(error) if isinstance(found, torch.nn.Module)]
    names = {id(module): name for name, module in modules[0].named_modules()} if modules else {}
    return next((f"layer {names[id(found)]}" for found in reversed(modules) if names.get(id(found))), "")


def _locals_named_self(error: BaseException) -> Iterator[object]:
    for frame, _line_number in traceback.walk_tb(error.__traceback__):
        yield frame.f_locals.get("self")


def _out_of_memory(error: BaseException) -> MemoryExhausted:
    return MemoryExhausted(
        "out of memory",
        where=_place(error),
        why=_line(error) or "the host could not give more",
        advice="use more ranks for one copy of the model (--tp_size), CPU offload if the model has it, a smaller "
        "image, or --device cpu; plan foretells what a job holds",
    )


def _disk_full(error: BaseException) -> EnvironmentFailure:
    return EnvironmentFailure(
        "the disk is full",
        where=str(getattr(error, "filename", None) or _place(error)),
        why=_line(error),
        advice="free space, then run the same command again: finished parts are reused",
    )


def _unusable(error: OSError) -> EnvironmentFailure:
    return EnvironmentFailure(
        "a file or folder cannot be used",
        where=str(error.filename),
        why=error.strerror or _line(error),
        advice="see what stands there, whether this user may read and write it, and whether its disk is well",
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


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
