"""Write a folder that appears whole or not at all, and never over one that holds something."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_core.errors import InputError


def require_new(folder: Path) -> None:
    """Raise InputError if `folder` holds something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{folder} already holds something",
            where="the folder to write",
            why="files of two models must not mix, and nothing of yours is deleted",
            advice="name a new folder, or remove this one",
        )


@contextmanager
def new_folder(target: Path, mode: int = 0o755) -> Iterator[Path]:
    """Yield a folder to fill, on the same disk, that becomes `target` at the end. Raises InputError as above."""
    require_new(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target} cannot be made",
            where="the folder to write",
            why=f"{error.strerror}: {error.filename}",
            advice="name a folder in one that exists and may be written to",
        ) from None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        whole = Path(unfinished, "pipeline")
        whole.mkdir(mode=mode)
        yield whole
        whole.rename(target)
