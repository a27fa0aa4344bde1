"""Tell a file that cannot be opened from one whose content is damaged: only the second is mended by removing it."""

from __future__ import annotations

import stat
from pathlib import Path

from quant_core.errors import InputError


def require_readable(file: Path, *, kind: str, missing: str) -> None:
    """Open a file once; kind: the ending it should have; missing: where it may come from.

    Raises InputError when it is not there, is no regular file, or this process may not or cannot open it.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError("not a regular file", where=str(file), advice=f"give the path of a {kind} file")
        file.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("no such file", where=str(file), advice=missing) from None
    except OSError as error:
        raise InputError(
            "the file cannot be opened",
            where=str(file),
            why=error.strerror or str(error),
            advice="let this user read it: see the owner and mode of the file and of its folders",
        ) from None
