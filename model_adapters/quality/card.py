"""The quality card of a checkpoint: what quantization did to pictures, latents, outputs and layers, as data.

A card of the same checkpoint made twice is the same file: it holds no time, no host and no path, lists are in a fixed
order, and numbers are rounded as their type says, to less than the last bits that two machines may differ in. It is
read without torch, so that a gate or a comparison of cards starts at once.

Decibels lie within plus and minus 150, which stand for "no difference" and "not a number" (JSON has neither).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quant_core.atomic_file import write_text_atomically
from quant_core.errors import InputError

FORMAT: Literal["dit-quality"] = "dit-quality"
VERSION: Literal[1] = 1

# Error has entered where the latents are this much further from the float model's than the floor's are: twice as far.
ENTRY_DB = 6.0
WORST_LAYERS = 3

Decibels = Annotated[float, AfterValidator(lambda value: round(value, 2))]
Share = Annotated[float, AfterValidator(lambda value: round(value, 4))]
RelativeError = Annotated[float, AfterValidator(lambda value: float(f"{value:.3g}"))]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Similarity(_Data):
    """Say how alike a picture is to the float model's (or the mean over pictures)."""

    psnr: Decibels = Field(description="peak signal-to-noise ratio in dB, 150 for equal pictures")
    ssim: Share = Field(description="structural similarity, 1 for equal pictures")
    flip: Share = Field(description="what an eye notices, 0 for equal pictures")


class PictureQuality(_Data):
    """Say of one picture how far the quantized model's is from the float model's, and how far the floor's is."""

    number: int = Field(description="the picture's number in the job")
    prompt: str
    seed: int = Field(description="of the initial noise")
    quantized: Similarity
    floor: Similarity


class StepQuality(_Data):
    """Say what one denoising step shows; None where nothing was measured.

    `latents` are relative errors (length of the difference over length) after the step, over all pictures; `output`
    is the SQNR of the transformer's output on the float model's inputs.
    """

    step: int
    latents: RelativeError | None = None
    latents_floor: RelativeError | None = None
    output: Decibels | None = None
    output_floor: Decibels | None = None


class LayerQuality(_Data):
    """Say how far a layer's own output is from the float layer's, on the same inputs: overall and per step."""

    name: str
    scheme: str
    sqnr: Decibels
    steps: Mapping[int, Decibels] = Field(default_factory=dict)


class Origin(_Data):
    """Say what was measured, and with what: no time, no host, no path."""

    model: str = Field(description="name of the adapter")
    quant_type: str
    fingerprint: str = Field(description="digest of the job that made the checkpoint")
    checkpoint: str = Field(default="", description="digest of the content of its files")
    options: Mapping[str, int | float | str | None] = Field(
        default_factory=dict, description="options of the pipeline that the pictures depend on"
    )
    dtype: str = Field(description="what float and quantized model compute in between the layers")
    floor_dtype: str = Field(description="what the noise floor computes in")
    versions: Mapping[str, str] = Field(default_factory=dict)


class QualityCard(_Data):
    """Hold everything that was measured of one checkpoint."""

    format: Literal["dit-quality"] = FORMAT
    version: Literal[1] = VERSION
    origin: Origin
    mean: Similarity | None = Field(default=None, description="over the quantized pictures; None if none was made")
    mean_floor: Similarity | None = None
    output_sqnr: Decibels | None = None
    output_floor_sqnr: Decibels | None = None
    pictures: tuple[PictureQuality, ...] = ()
    steps: tuple[StepQuality, ...] = ()
    layers: tuple[LayerQuality, ...] = ()

    @property
    def worst_layers(self) -> tuple[LayerQuality, ...]:
        """Return the three layers with the least SQNR, the worst first."""
        return tuple(sorted(self.layers, key=lambda layer: (layer.sqnr, layer.name))[:WORST_LAYERS])

    @property
    def entry_step(self) -> int | None:
        """Return the first step after which the latents' error is ENTRY_DB above the floor's; None if none is."""
        factor = 10 ** (ENTRY_DB / 20)
        for step in self.steps:
            if step.latents is not None and step.latents > factor * (step.latents_floor or 0.0):
                return step.step
        return None

    def to_json(self) -> str:
        """Return the card as text, the same for the same card."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: Path) -> Path:
        """Publish the card under a path, whole or not at all."""
        return write_text_atomically(path, self.to_json())


def read_card(path: Path) -> QualityCard:
    """Read a card. Raises InputError for a file that is missing or no card."""
    try:
        return QualityCard.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        else:
            why = str(error)
        raise InputError(
            "this is no quality card that can be read", where=str(path), why=why, advice="evaluate the checkpoint again"
        ) from None
