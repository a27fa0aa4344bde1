"""Turn a quality card into a yes or no: what a checkpoint must reach to be let through."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from model_adapters.quality.card import QualityCard
from quant_core.errors import VerificationError

# The thresholds that only pictures can miss or reach.
OF_PICTURES = frozenset({"min_psnr", "min_ssim", "max_flip"})


class Thresholds(BaseModel):
    """Say what a checkpoint must reach; None asks for nothing. Field names are the options' names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_psnr: float | None = Field(default=None, ge=0, description="least mean PSNR of the pictures, in dB")
    min_ssim: float | None = Field(default=None, ge=-1, le=1, description="least mean SSIM of the pictures")
    max_flip: float | None = Field(default=None, ge=0, le=1, description="largest mean FLIP of the pictures")
    min_output_sqnr: float | None = Field(default=None, description="least SQNR of the transformer's output, in dB")
    min_layer_sqnr: float | None = Field(default=None, description="least SQNR of every quantized layer, in dB")

    @property
    def needs_pictures(self) -> bool:
        """Tell whether any of them is about pictures."""
        return any(getattr(self, name) is not None for name in OF_PICTURES)


def shortfalls(card: QualityCard, thresholds: Thresholds) -> list[str]:
    """Return what falls short, one sentence each; a figure that was not measured falls short of any threshold."""
    return [*_of_means(card, thresholds), *_of_layers(card, thresholds)]


def check_quality(card: QualityCard, thresholds: Thresholds, *, where: str) -> None:
    """Raise VerificationError when the card falls short; `where` names the card's file."""
    found = shortfalls(card, thresholds)
    if found:
        raise VerificationError(
            "the checkpoint falls short of what was asked for",
            where=where,
            why="; ".join(found),
            advice=_advice(card, thresholds),
        )


def _of_means(card: QualityCard, thresholds: Thresholds) -> Iterator[str]:
    mean = card.mean
    for what, figure, least, unit in (
        ("PSNR of the pictures", mean and mean.psnr, thresholds.min_psnr, " dB"),
        ("SSIM of the pictures", mean and mean.ssim, thresholds.min_ssim, ""),
        ("SQNR of the transformer's output", card.output_sqnr, thresholds.min_output_sqnr, " dB"),
    ):
        if least is not None and figure is None:
            yield f"{what} was not measured"
        elif least is not None and figure is not None and figure < least:
            yield f"{what} is {figure:g}{unit}, below {least:g}"
    if thresholds.max_flip is not None:
        if mean is None:
            yield "FLIP of the pictures was not measured"
        elif mean.flip > thresholds.max_flip:
            yield f"FLIP of the pictures is {mean.flip:g}, above {thresholds.max_flip:g}"


def _of_layers(card: QualityCard, thresholds: Thresholds) -> Iterator[str]:
    least = thresholds.min_layer_sqnr
    if least is None:
        return
    below = sorted((layer.sqnr, layer.name) for layer in card.layers if layer.sqnr < least)
    if not card.layers:
        yield "SQNR of the layers was not measured"
    elif below:
        worst, name = below[0]
        others = f" ({len(below)} layers fall short)" if len(below) > 1 else ""
        yield f"SQNR of '{name}' is {worst:g} dB, below {least:g}{others}"


def _advice(card: QualityCard, thresholds: Thresholds) -> str:
    if thresholds.needs_pictures and card.mean is None:
        return "make pictures (--evaluate 4), or ask for output and layers only"
    if not card.layers:
        return "calibrate with more prompts, or lower the threshold"
    names = " ".join(f"'{layer.name}'" for layer in card.worst_layers)
    return f"keep the worst layers float (--disable_names {names}), smooth (--anti_method m4), or lower the threshold"
