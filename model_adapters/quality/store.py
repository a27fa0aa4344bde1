"""Where the pictures of an evaluation lie while it runs, so that an interrupted one goes on with the next picture.

    float/<stem>.png  floor/<stem>.png  quantized/<stem>.png      what people look at
    float/<stem>.json ...                                         whose picture it is, and its latents' ratios by step
    work/<stem>.latents.safetensors                               the float model's latents after each step
    work/<stem>.records                                           what its transformer was called with, in some steps

A picture counts when its note is there, which is written last and carries the fingerprint of what it depends on: one
for the float model's pictures, another for those of the checkpoint. So several checkpoints of one model may be
evaluated against the same float pictures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_adapters.pipeline.prompts import Batch, ImageRequest
from model_adapters.quality.measured import MeasuredPicture
from model_adapters.quality.metrics import similarity
from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.calibration.records import Record, as_records, load_dump, save_dump
from quant_core.errors import InputError
from quant_core.quality.ratio import Ratio

FLOAT, FLOOR, QUANTIZED = "float", "floor", "quantized"
_WORK = "work"
# The latents of one picture by step, and its ratios by step.
Latents = Mapping[int, Tensor]
Ratios = Mapping[int, Ratio]


@dataclass(frozen=True)
class PictureStore:
    """Keep and find pictures in a folder. fingerprints: by kind, what the pictures depend on. seed: of the job."""

    folder: Path
    fingerprints: Mapping[str, str]
    seed: int

    def picture(self, kind: str, request: ImageRequest) -> Path:
        """Return where a picture lies."""
        return self.folder / kind / f"{request.file_stem}.png"

    def has(self, kind: str, batch: Batch) -> bool:
        """Tell whether all of a batch is there, of the right fingerprint (for the float model with all it left)."""
        return all(self._has(kind, request) for request in batch) and (kind != FLOAT or self._has_work(batch))

    def keep(self, kind: str, batch: Batch, images: Sequence[Any], ratios: Sequence[Ratios]) -> None:
        """Publish a batch's PIL images, and for each the ratios of its latents by step."""
        for request, image, found in zip(batch, images, ratios, strict=True):
            write_atomically(self.picture(kind, request), partial(_write_png, image))
            note = {
                "fingerprint": self.fingerprints[kind],
                "number": request.number,
                "prompt": request.prompt,
                "latents": {str(step): [ratio.signal, ratio.noise] for step, ratio in sorted(found.items())},
            }
            write_text_atomically(self._note(kind, request), json.dumps(note, indent=1) + "\n")

    def keep_work(self, batch: Batch, latents: Latents, records: Sequence[Any]) -> None:
        """Publish the float model's latents (batch, ...) by step and the records of a batch, before its pictures."""
        tensors = {str(step): tensor.contiguous() for step, tensor in latents.items()}
        write_atomically(self._latents(batch), partial(save_file, tensors))
        save_dump(self._records(batch), records, {"fingerprint": self.fingerprints[FLOAT]})

    def latents(self, batch: Batch, step: int) -> Tensor:
        """Return the float model's latents (batch, ...) after a step; InputError when they are not there."""
        path = self._latents(batch)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(str(step))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the float model's latents of step {step} cannot be read",
                where=str(path),
                why=str(error),
                advice="remove the folder and evaluate again",
            ) from None

    def records(self, batches: Iterable[Batch]) -> list[Record]:
        """Return what the float model's transformer was called with, in the order of the batches."""
        dumps = [load_dump(self._records(batch)) for batch in batches]
        return [record for dump in dumps for record in as_records(dump)]

    def measured(self, request: ImageRequest) -> MeasuredPicture:
        """Compare the quantized picture and the floor's with the float model's; all three must be there."""
        reference, floor, quantized = (_read(self.picture(kind, request)) for kind in (FLOAT, FLOOR, QUANTIZED))
        return MeasuredPicture(
            number=request.number,
            prompt=request.prompt,
            seed=self.seed + request.number,
            quantized=similarity(reference, quantized),
            floor=similarity(reference, floor),
            latents=self._ratios(QUANTIZED, request),
            latents_floor=self._ratios(FLOOR, request),
        )

    def discard(self) -> None:
        """Remove all pictures, and what is kept beside them."""
        for folder in (FLOAT, FLOOR, QUANTIZED, _WORK):
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def tidy(self, batches: Iterable[Batch]) -> None:
        """Remove what nobody looks at after the evaluation: latents and records."""
        for batch in batches:
            self._latents(batch).unlink(missing_ok=True)
            self._records(batch).unlink(missing_ok=True)
        work = self.folder / _WORK
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()

    def _has(self, kind: str, request: ImageRequest) -> bool:
        note = self._read_note(kind, request)
        return note.get("fingerprint") == self.fingerprints[kind] and self.picture(kind, request).is_file()

    def _has_work(self, batch: Batch) -> bool:
        return self._latents(batch).is_file() and self._records(batch).is_file()

    def _ratios(self, kind: str, request: ImageRequest) -> dict[int, Ratio]:
        return {int(step): Ratio(*sums) for step, sums in self._read_note(kind, request).get("latents", {}).items()}

    def _read_note(self, kind: str, request: ImageRequest) -> dict[str, Any]:
        """Return a picture's note, empty when there is none that can be read: the picture is made again."""
        try:
            note = json.loads(self._note(kind, request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _note(self, kind: str, request: ImageRequest) -> Path:
        return self.picture(kind, request).with_suffix(".json")

    def _latents(self, batch: Batch) -> Path:
        return self.folder / _WORK / f"{batch[0].file_stem}.latents.safetensors"

    def _records(self, batch: Batch) -> Path:
        return self.folder / _WORK / f"{batch[0].file_stem}.records"


def _write_png(image: Any, path: Path) -> None:
    image.save(path, format="PNG")


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(
            "a picture of the evaluation cannot be read",
            where=str(path),
            why=str(error),
            advice="remove it and evaluate again",
        ) from None
