"""Look at the places where a job will write, before it has anything to write there."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.config.job_config import JobConfig
from quant_core.errors import ConfigurationError


def check_save_path(config: JobConfig, *, lists: bool = True) -> None:
    """Refuse places for the images, and for their list where this rank writes it, that can hold none.

    The list comes last, when hours may have gone into the images. Raises ConfigurationError.
    """
    if not config.output.do_save_img:
        return
    place_of(config.output.save_path, "--save_path")
    if lists:
        _check_list(Path(config.pipeline.info_file_save_path), "--info_file_save_path")


def _check_list(path: Path, flag: str) -> None:
    if path.is_dir():
        raise ConfigurationError(
            f"'{path}' is a folder",
            where=flag,
            why="the list of images is a file",
            advice=f"{path}/image_info.json",
        )
    place = place_of(path.parent, flag)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"'{place}' may not be written to",
            where=flag,
            why="the list of the images goes there",
            advice="give a file in another folder",
        )


def place_of(folder: Path, flag: str) -> Path:
    """Return the folder, or the nearest one above it that exists; raises ConfigurationError where that is a file."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        raise ConfigurationError(
            f"'{place}' is a file", where=flag, why="a folder goes there", advice="give another folder"
        )
    return place
