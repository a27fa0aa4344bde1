"""Say what a picture shows, without a trained classifier: the colours by their place, the shape by its best template.

The colour of the margin is the ground, the median of what differs from it is the colour of the shape, and how far each
pixel lies between the two gives a mask. The mask is correlated with every shape in every placement of a fine grid. A
picture shows its best shape only where the correlation is high: a blob is no circle.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scripts.tiny_training.drawing import COLOURS, GROWTH, SHAPES, SHIFT, SIDE, TURN, Scene, draw_mask, split_scenes

LEAST_LIKENESS = 0.88  # correlation; drawn pictures reach 0.92, another shape of any size 0.90 at most
_MARGIN = 3  # pixels that no shape covers
_AT_ONCE = 11  # pictures
_GRID_COLUMNS = 11
_FAINT = 0.15  # difference of colours (of a range of 1) below which there is no shape


@dataclass(frozen=True)
class Sight:
    """Say what a picture shows and how much its mask resembles the best template (a correlation, 1 is equal)."""

    scene: Scene
    likeness: float

    def shows(self, scene: Scene) -> bool:
        """Tell whether this is the scene asked for, clearly drawn."""
        return self.scene == scene and self.likeness >= LEAST_LIKENESS


def look(picture: Tensor) -> Sight | None:
    """Name shape, colour and ground of a picture of (3, SIDE, SIDE) between 0 and 1; None if it shows no shape."""
    margin = torch.ones(picture.shape[1:], dtype=torch.bool)
    margin[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = False
    ground = picture[:, margin].median(1).values
    difference = (picture - ground[:, None, None]).abs().amax(0)
    strongest = difference.flatten().kthvalue(int(0.95 * difference.numel())).values
    if strongest < _FAINT:
        return None
    paint = picture[:, difference > 0.6 * strongest].median(1).values
    way = paint - ground
    mask = ((picture - ground[:, None, None]) * way[:, None, None]).sum(0) / way.square().sum()
    names, templates = _templates()
    likeness = templates @ _normalized(mask.clamp(0, 1)[None])[0]
    best = int(likeness.argmax())
    return Sight(Scene(names[best], _nearest_colour(paint), _nearest_colour(ground)), likeness[best].item())


def _nearest_colour(colour: Tensor) -> str:
    distances = {name: (colour - torch.tensor(rgb)).square().sum().item() for name, rgb in COLOURS.items()}
    return min(distances, key=distances.__getitem__)


@functools.cache
def _templates() -> tuple[list[str], Tensor]:
    """Return the name of each template's shape, and the templates, normalized: (templates, SIDE * SIDE)."""
    shifts = [SHIFT * step for step in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    sizes, angles = [1 - GROWTH, 1.0, 1 + GROWTH], [-TURN, 0.0, TURN]
    placements = torch.tensor(list(itertools.product(shifts, shifts, sizes, angles)))
    masks = torch.cat([draw_mask(shape, placements) for shape in SHAPES])
    return [shape for shape in SHAPES for _ in placements], _normalized(masks)


def _normalized(masks: Tensor) -> Tensor:
    flat = masks.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-6)


def paint(pipeline: Any, scenes: Sequence[Scene], steps: int, guidance: float, first_seed: int = 0) -> Tensor:
    """Paint one picture a scene with a real pipeline, each from the next seed: (pictures, 3, SIDE, SIDE), 0 to 1."""
    parts = []
    for first in range(0, len(scenes), _AT_ONCE):
        captions = [scene.caption for scene in scenes[first : first + _AT_ONCE]]
        seeds = range(first_seed + first, first_seed + first + len(captions))
        pictures = pipeline(
            captions,
            width=SIDE,
            height=SIDE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        parts.append(pictures.float().cpu())
    return torch.cat(parts)


def held_out_scenes(count: int) -> list[Scene]:
    """Return `count` scenes that no training shows, from the first again where they run out."""
    return list(itertools.islice(itertools.cycle(split_scenes()[1]), count))


def summary(sights: Sequence[Sight | None], scenes: Sequence[Scene]) -> str:
    """Count, in one line, the pictures that are right in all, and in each respect."""
    pairs = list(zip(sights, scenes))
    right = sum(sight is not None and sight.shows(scene) for sight, scene in pairs)
    parts = {
        part: sum(sight is not None and getattr(sight.scene, part) == getattr(scene, part) for sight, scene in pairs)
        for part in ("shape", "colour", "ground")
    }
    clear = sum(sight is not None and sight.likeness >= LEAST_LIKENESS for sight in sights)
    counts = ", ".join(f"{part} {count}" for part, count in {**parts, "clear": clear}.items())
    return f"{right} of {len(pairs)} ({right / len(pairs):.1%}): {counts}"


def save_grid(pictures: Tensor, file: str) -> None:
    """Write pictures of (pictures, 3, SIDE, SIDE), 0 to 1, side by side into one PNG."""
    rows = pictures.mul(255).round().byte().permute(0, 2, 3, 1).split(_GRID_COLUMNS)
    whole = torch.cat([_padded(torch.cat(list(row), 1), _GRID_COLUMNS * SIDE) for row in rows], 0)
    Image.fromarray(whole.numpy()).save(file)


def _padded(row: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1]))
