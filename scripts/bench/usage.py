"""What a process used, from the kernel's own books: processor time, memory, bytes moved."""

from __future__ import annotations

from pathlib import Path

_MARKS = {"now": "VmRSS", "peak": "VmHWM"}


def resident(process: int | str = "self", mark: str = "now") -> int:
    """Return the resident set of a process in bytes, mapped file pages included: `now`, or its `peak`.

    Not `ru_maxrss`: that of a program begins with the peak of whoever started it.
    Raises OSError when the process has ended.
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(_MARKS[mark] + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {process} has no resident set any more")


def forget_peak() -> None:
    """Let this process's peak begin again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def moved(process: int | str = "self") -> dict[str, int]:
    """Return the bytes that a process and the children it waited for have moved.

    `read_bytes` and `write_bytes` went between memory and disk, `rchar` through calls that read, whatever the page
    cache held. A mapped file that was cached already appears in neither.
    """
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
