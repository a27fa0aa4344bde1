"""What outlier suppression made of its inputs' channels, in a small file beside the checkpoint: for a report only.

A checkpoint of an earlier version has none, and a file that is damaged or of another job counts as none: nothing but a
drawing rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from quant_core.atomic_file import write_text_atomically
from quant_core.smoothing.channels import SmoothedInput

Magnitude = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class Spread(_Data):
    """The largest |x| of the largest channel of an input, and that of the channel in the middle."""

    largest: Magnitude
    middle: Magnitude

    @property
    def ratio(self) -> float:
        """Return how far the largest channel stands out; 1 for channels that carry nothing."""
        return self.largest / self.middle if self.middle else 1.0


class InputSpread(_Data):
    """The layers that read one input, and its channels before it is divided and after."""

    layers: tuple[str, ...]
    before: Spread
    after: Spread

    @property
    def bits(self) -> float:
        """Return how many bits of a common scale the channel in the middle gains against the largest one."""
        return math.log2(self.before.ratio / self.after.ratio)


class SmoothedInputs(_Data):
    """All inputs that a job divided, in model order; fingerprint: that of the job."""

    version: Literal[1] = 1
    fingerprint: str
    inputs: tuple[InputSpread, ...]


def smoothed_text(inputs: Iterable[SmoothedInput], fingerprint: str) -> str:
    """Return the text of the file; empty where nothing was divided."""
    found = tuple(InputSpread.model_validate(each) for each in inputs)
    return SmoothedInputs(fingerprint=fingerprint, inputs=found).model_dump_json(indent=1) + "\n" if found else ""


def read_smoothed(path: Path, fingerprint: str) -> tuple[InputSpread, ...]:
    """Return what the file says of the job of that fingerprint; nothing where it says nothing of it."""
    try:
        told = SmoothedInputs.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return ()
    return told.inputs if told.fingerprint == fingerprint else ()


def copy_smoothed(source: Path, fingerprint: str, target: Path, new_fingerprint: str) -> None:
    """Say the same of another job's checkpoint, whose inputs are divided alike."""
    if found := read_smoothed(source, fingerprint):
        told = SmoothedInputs(fingerprint=new_fingerprint, inputs=found)
        write_text_atomically(target, told.model_dump_json(indent=1) + "\n")
