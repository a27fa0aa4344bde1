"""What one rank has measured, unrounded, and how the ranks' parts become one card.

Pictures are listed by their number in the job; ratios are sums, and sums add up. So the card does not depend on how
pictures and records were shared out. (Tensor parallelism adds floats in another order inside the model; that moves
figures by what the noise floor says, not more.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from model_adapters.quality.card import LayerQuality, Origin, PictureQuality, QualityCard, Similarity, StepQuality
from quant_core.quality.ratio import Ratio, StepRatios


@dataclass(frozen=True)
class MeasuredPicture:
    """One picture: how alike, and the ratios of its latents by step."""

    number: int
    prompt: str
    seed: int
    quantized: Similarity
    floor: Similarity
    latents: Mapping[int, Ratio]
    latents_floor: Mapping[int, Ratio]


@dataclass
class Measured:
    """All that a rank has measured; `schemes` and `layers` are by layer."""

    pictures: list[MeasuredPicture] = field(default_factory=list)
    schemes: dict[str, str] = field(default_factory=dict)
    layers: dict[str, StepRatios] = field(default_factory=dict)
    output: StepRatios = field(default_factory=StepRatios)
    output_floor: StepRatios = field(default_factory=StepRatios)


def merged(parts: Iterable[Measured]) -> Measured:
    """Return what all ranks measured together; a picture that several ranks made together counts once."""
    whole, pictures = Measured(), {}
    for part in parts:
        pictures.update({picture.number: picture for picture in part.pictures})
        whole.schemes.update(part.schemes)
        whole.output.update(part.output)
        whole.output_floor.update(part.output_floor)
        for name, ratios in part.layers.items():
            whole.layers.setdefault(name, StepRatios()).update(ratios)
    whole.pictures.extend(pictures[number] for number in sorted(pictures))
    return whole


def card_of(parts: Iterable[Measured], origin: Origin) -> QualityCard:
    """Return the card of what all ranks measured."""
    whole = merged(parts)
    return QualityCard(
        origin=origin,
        mean=_mean([picture.quantized for picture in whole.pictures]),
        mean_floor=_mean([picture.floor for picture in whole.pictures]),
        output_sqnr=_decibels(whole.output),
        output_floor_sqnr=_decibels(whole.output_floor),
        pictures=tuple(_picture(picture) for picture in whole.pictures),
        steps=_steps(whole),
        layers=tuple(_layer(name, whole) for name in sorted(whole.layers)),
    )


def _picture(picture: MeasuredPicture) -> PictureQuality:
    return PictureQuality(
        number=picture.number,
        prompt=picture.prompt,
        seed=picture.seed,
        quantized=picture.quantized,
        floor=picture.floor,
    )


def _layer(name: str, whole: Measured) -> LayerQuality:
    ratios = whole.layers[name]
    steps = {step: ratio.decibels for step, ratio in ratios.steps().items()}
    return LayerQuality(name=name, scheme=whole.schemes.get(name, "?"), sqnr=ratios.overall.decibels, steps=steps)


def _steps(whole: Measured) -> tuple[StepQuality, ...]:
    latents = _of_all([picture.latents for picture in whole.pictures])
    floor = _of_all([picture.latents_floor for picture in whole.pictures])
    output, output_floor = whole.output.steps(), whole.output_floor.steps()
    return tuple(
        StepQuality(
            step=step,
            latents=latents[step].relative_error if step in latents else None,
            latents_floor=floor[step].relative_error if step in floor else None,
            output=output[step].decibels if step in output else None,
            output_floor=output_floor[step].decibels if step in output_floor else None,
        )
        for step in sorted({*latents, *output})
    )


def _of_all(pictures: Sequence[Mapping[int, Ratio]]) -> dict[int, Ratio]:
    """Return each step's ratio over all pictures."""
    ratios = StepRatios()
    for picture in pictures:
        for step, ratio in picture.items():
            ratios.add(step, ratio)
    return ratios.steps()


def _mean(found: Sequence[Similarity]) -> Similarity | None:
    if not found:
        return None
    means = {name: math.fsum(getattr(each, name) for each in found) / len(found) for name in Similarity.model_fields}
    return Similarity(**means)


def _decibels(ratios: StepRatios) -> float | None:
    return ratios.overall.decibels if ratios.by_step else None
