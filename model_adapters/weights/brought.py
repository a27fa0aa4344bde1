"""What a person asks of a transformer's weights: which of the folder's, which file instead, what changes them."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model_adapters.options import PipelineOptions
from quant_core.errors import InputError

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LoraFile:
    """Name a LoRA file and how strongly it is applied."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Read `FILE[:scale]`; a colon that no finite number follows belongs to the file's name."""
        path, colon, scale = text.rpartition(":")
        with suppress(ValueError):
            if colon and path and math.isfinite(number := float(scale)):
                return cls(Path(path).expanduser(), number)
        return cls(Path(text).expanduser())


@dataclass(frozen=True)
class Brought:
    """Name the file of the transformer, if it is not the folder's, and the LoRA files, in the order to apply them.

    variant: whose files of the folder are read; None: the usual ones, or those of the only variant.
    """

    transformer: Path | None = None
    loras: tuple[LoraFile, ...] = ()
    variant: str | None = None

    @classmethod
    def of(cls, options: PipelineOptions) -> Brought:
        """Return the files that options name.

        Raises InputError for one that is not there or is no safetensors file.
        """
        transformer = None if options.transformer is None else Path(options.transformer).expanduser()
        loras = tuple(LoraFile.parse(text) for text in options.lora)
        if transformer is not None:
            _require_file(transformer, "--transformer")
        for lora in loras:
            _require_file(lora.path, "--lora")
        return cls(transformer, loras, options.variant)


NOTHING = Brought()


def _require_file(path: Path, flag: str) -> None:
    if path.suffix == _SUFFIX and path.is_file():
        return
    raise InputError(
        f"'{path}' is no {_SUFFIX} file" if path.exists() else f"there is no file '{path}'",
        where=f"{flag} {path}",
        why=f"{flag} takes one {_SUFFIX} file of this machine; a pickle would run whatever it holds",
        advice="check the path; --lora FILE:0.8 sets a scale" if flag == "--lora" else "check the path",
    )
