"""Say in a few sentences what a quality card means."""

from __future__ import annotations

from collections.abc import Iterator

from model_adapters.quality.card import ENTRY_DB, QualityCard
from quant_core.errors import VerificationError

# A scale that is wrong by a factor of two leaves 0 dB, 3 if one rank of two has it. Static ranges on outliers were seen
# at 4.
BROKEN_DB = 3.5
# Of one seed: the least PSNR that anyone accepts, and what is recommended (spec: evaluation).
_ACCEPTED_DB, _RECOMMENDED_DB = 20.0, 30.0
# Differences of means over a few pictures within this say nothing.
_EVEN_DB = 1.0


def verdict(card: QualityCard) -> list[str]:
    """Return the verdict, one sentence each: pictures, floor, where error enters, output, layers."""
    return [*_pictures(card), *_entry(card), *_output(card), *_layers(card)]


def is_broken(card: QualityCard) -> bool:
    """Tell whether some layer computes something else than its float self."""
    return any(layer.sqnr < BROKEN_DB for layer in card.layers)


def require_sound(card: QualityCard, *, where: str) -> None:
    """Raise VerificationError when the card's checkpoint is broken; `where` names the card's file."""
    if is_broken(card):
        broken = sorted((layer.sqnr, layer.name) for layer in card.layers if layer.sqnr < BROKEN_DB)
        others = f", and {_count(len(broken) - 1, 'other layer')}" if len(broken) > 1 else ""
        raise VerificationError(
            "the checkpoint is broken",
            where=where,
            why=f"'{broken[0][1]}' has {broken[0][0]:g} dB{others}; rounding leaves more than {BROKEN_DB:g}",
            advice="look for a wrong scale, a damaged file or files of swapped ranks: python -m launcher verify FOLDER",
        )


def _pictures(card: QualityCard) -> Iterator[str]:
    if card.mean is None:
        yield "No picture was made: what follows is about layers and outputs only."
        return
    mean, count = card.mean, len(card.pictures)
    worst = min(card.pictures, key=lambda picture: picture.quantized.psnr)
    yield (
        f"{_count(count, 'picture')} of the quantized model: {_grade(mean.psnr)}, PSNR {mean.psnr:.1f} dB in the mean "
        f"and {worst.quantized.psnr:.1f} at worst (picture {worst.number}), SSIM {mean.ssim:.3f}, FLIP {mean.flip:.3f}."
    )
    if card.mean_floor is not None:
        yield f"That is {_against(mean.psnr, card.mean_floor.psnr)} ({card.mean_floor.psnr:.1f} dB)."


def _entry(card: QualityCard) -> Iterator[str]:
    measured = [step for step in card.steps if step.latents is not None]
    if not measured:
        return
    last, entry = measured[-1], card.entry_step
    end = f"after the last step they are off by {100 * (last.latents or 0):.2g} %"
    if last.latents_floor is not None:
        end += f", the floor's by {100 * last.latents_floor:.2g} %"
    if entry is None:
        yield f"In no step do the latents leave the floor by {ENTRY_DB:g} dB; {end}."
    else:
        yield f"Error enters in step {entry}, the first with latents {ENTRY_DB:g} dB above the floor; {end}."


def _output(card: QualityCard) -> Iterator[str]:
    if card.output_sqnr is None:
        return
    sentence = f"The transformer's output has an SQNR of {card.output_sqnr:.1f} dB"
    if card.output_floor_sqnr is not None:
        sentence += f", {_against(card.output_sqnr, card.output_floor_sqnr)} ({card.output_floor_sqnr:.1f} dB)"
    known = [(step.output, step.step) for step in card.steps if step.output is not None]
    if len(known) > 1:
        worst, step = min(known)
        sentence += f"; the worst step is {step} with {worst:.1f} dB"
    yield f"{sentence}."


def _layers(card: QualityCard) -> Iterator[str]:
    if not card.layers:
        return
    named = ", ".join(f"{layer.name} ({layer.scheme}) {layer.sqnr:.1f} dB" for layer in card.worst_layers)
    yield f"The worst of {_count(len(card.layers), 'layer')}: {named}."
    broken = sum(layer.sqnr < BROKEN_DB for layer in card.layers)
    if broken:
        yield (
            f"BROKEN: {_count(broken, 'layer')} below {BROKEN_DB:g} dB, which rounding does not do: "
            "look for a wrong scale, a damaged file or files of swapped ranks."
        )


def _grade(psnr: float) -> str:
    if psnr >= _RECOMMENDED_DB:
        return "close to the float model's"
    return "recognisably the same" if psnr >= _ACCEPTED_DB else "NOT the same pictures"


def _against(figure: float, floor: float) -> str:
    if figure >= floor + _EVEN_DB:
        return f"{figure - floor:.1f} dB better than the noise floor, a difference that means nothing"
    if figure > floor - _EVEN_DB:
        return "level with the noise floor"
    return f"{floor - figure:.1f} dB short of the noise floor"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
