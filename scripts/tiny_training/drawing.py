"""Draw the pictures that the tiny models learn: one coloured shape on a ground of another colour, with its caption.

A picture is `Scene` (what it shows, which the caption says) and `Placement` (where exactly, which it does not). The
placement varies little: with strong jitter a small model learns colours and paints blobs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # pixels
SAMPLES = 3  # points a pixel and axis, for smooth edges
RADIUS = 0.70  # of a shape, where the picture reaches from -1 to 1
SHIFT, GROWTH, TURN = 0.08, 0.08, 0.10  # largest jitter: of the centre, of the size (a share), of the angle (radians)
HELD_OUT_SHARE = 10  # one caption in so many is never shown in training

# Close to the corners of the colour cube, so that a picture is right or wrong and rarely in between.
COLOURS = {
    "red": (0.87, 0.13, 0.13),
    "green": (0.13, 0.70, 0.20),
    "blue": (0.13, 0.20, 0.87),
    "yellow": (0.93, 0.87, 0.13),
    "purple": (0.67, 0.13, 0.73),
    "cyan": (0.13, 0.80, 0.87),
    "white": (0.93, 0.93, 0.93),
    "black": (0.07, 0.07, 0.07),
}


@dataclass(frozen=True)
class Scene:
    """Name what a picture shows."""

    shape: str
    colour: str
    ground: str

    @property
    def caption(self) -> str:
        """Say it in words: the prompt of a tiny model."""
        return f"a {self.colour} {self.shape} on a {self.ground} ground"


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y.square() < 0.81


def _ring(x: Tensor, y: Tensor) -> Tensor:
    squared = x.square() + y.square()
    return (squared < 0.90) & (squared > 0.30)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) < 0.80


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return x.abs() + y.abs() < 1.05


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y < 0.75) & (y > 1.9 * x.abs() - 0.95)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    shorter, longer = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return (shorter < 0.28) & (longer < 0.92)


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = 2 * torch.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2  # from the nearest tip; one points up
    radius = (x.square() + y.square()).sqrt()
    along, across = radius * angle.cos(), radius * angle.abs().sin()
    return along + 2.0 * across < 1.05


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = 1.2 * x, 0.15 - 1.2 * y
    return (x.square() + y.square() - 1).pow(3) < x.square() * y.pow(3)


SHAPES = {
    "circle": _disc,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
}
SCENES = tuple(itertools.starmap(Scene, (s for s in itertools.product(SHAPES, COLOURS, COLOURS) if s[1] != s[2])))
SCENE_OF_CAPTION = {scene.caption: scene for scene in SCENES}


def split_scenes() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Return the scenes to train on and those held out; the split is the same for every seed, as the prompts are."""
    shuffled = random.Random("held out").sample(SCENES, len(SCENES))
    held_out = len(SCENES) // HELD_OUT_SHARE
    return tuple(shuffled[held_out:]), tuple(shuffled[:held_out])


def random_placements(count: int, generator: torch.Generator) -> Tensor:
    """Draw placements: (count, 4) of centre x, centre y, size (1 is the usual one), angle in radians."""
    jitter = 2 * torch.rand(count, 4, generator=generator) - 1
    return jitter * torch.tensor([SHIFT, SHIFT, GROWTH, TURN]) + torch.tensor([0.0, 0.0, 1.0, 0.0])


def draw_mask(shape: str, placements: Tensor) -> Tensor:
    """Return how much of each pixel a shape covers.

    placements: (pictures, 4), as `random_placements` makes them. Returns (pictures, SIDE, SIDE) between 0 and 1.
    """
    points = SIDE * SAMPLES
    axis = (torch.arange(points) + 0.5) / points * 2 - 1
    centre_x, centre_y, size, angle = (column[:, None, None] for column in placements.unbind(1))
    x, y = axis[None, None, :] - centre_x, axis[None, :, None] - centre_y
    turned_x = (x * angle.cos() + y * angle.sin()) / (RADIUS * size)
    turned_y = (y * angle.cos() - x * angle.sin()) / (RADIUS * size)
    inside = SHAPES[shape](turned_x, turned_y).float()
    return torch.nn.functional.avg_pool2d(inside[:, None], SAMPLES)[:, 0]


def draw(scenes: Sequence[Scene], placements: Tensor) -> Tensor:
    """Draw one picture a scene. placements: (pictures, 4). Returns (pictures, 3, SIDE, SIDE) between 0 and 1."""
    masks = torch.cat([draw_mask(scene.shape, place[None]) for scene, place in zip(scenes, placements)])[:, None]
    paint, ground = (
        torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
        for names in ([scene.colour for scene in scenes], [scene.ground for scene in scenes])
    )
    return masks * paint + (1 - masks) * ground
