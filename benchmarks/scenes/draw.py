"""Draw one scene: a whole garment among pieces of others and strokes, on textured noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

#: Side of a scene in pixels; with patches of 4×4 there are 14×14.
SIDE = 56
#: Where a garment's picture is brighter than this (of 255) there is garment.
_GARMENT = 12


@dataclass(frozen=True)
class Clutter:
    """How a scene is filled. Pairs are ranges, both ends possible.

    Attributes:
        scale: side of the garment's picture, of the scene's.
        pieces: how many pieces of other classes' garments.
        piece: share of the side of such a garment's picture that a piece shows.
        piece_scale: side of a piece, of the scene's.
        strokes: how many straight strokes, one or two pixels wide.
        grey: brightness of the ground, of 1.
        texture: standard deviation of its smooth noise, of 1.
        grain: standard deviation of the noise of each pixel, of 1.
    """

    scale: tuple[float, float] = (0.35, 0.8)
    pieces: tuple[int, int] = (2, 4)
    piece: tuple[float, float] = (0.4, 0.6)
    piece_scale: tuple[float, float] = (0.15, 0.3)
    strokes: tuple[int, int] = (2, 5)
    grey: tuple[float, float] = (0.05, 0.25)
    texture: float = 0.07
    grain: float = 0.04


def draw_scene(
    garment: np.ndarray,
    others: Sequence[np.ndarray],
    rng: np.random.Generator,
    clutter: Clutter | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One garment, whole and in front, at a random place and scale.

    Args:
        garment: H×W, bytes, on black.
        others: garments of other classes, to cut pieces from, one for each piece at most.
        rng: all that is random follows from it.
        clutter: how the scene is filled; ``None``: the defaults.

    Returns:
        The scene and where the garment is, ``SIDE``×``SIDE`` bytes each.
    """
    c = Clutter() if clutter is None else clutter
    scene = Image.fromarray(_ground(c, rng))
    for other in others[: rng.integers(c.pieces[0], c.pieces[1], endpoint=True)]:
        _paste(scene, _cut(other, rng.uniform(*c.piece), rng), rng.uniform(*c.piece_scale), rng)
    pen = ImageDraw.Draw(scene)
    for _ in range(rng.integers(c.strokes[0], c.strokes[1], endpoint=True)):
        ends = rng.uniform(0, SIDE, size=2), rng.uniform(-0.35, 0.35, size=2) * SIDE
        line = (*ends[0], *(ends[0] + ends[1]))
        pen.line(line, fill=int(rng.integers(60, 256)), width=int(rng.integers(1, 3)))
    mask = _paste(scene, garment, rng.uniform(*c.scale), rng)
    grain = rng.normal(0, 255 * c.grain, size=(SIDE, SIDE))
    return np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8), mask


def _ground(clutter: Clutter, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of two grain sizes."""
    ground = np.full((SIDE, SIDE), rng.uniform(*clutter.grey), dtype=np.float32)
    for cells in (4, 14):
        noise = rng.normal(0, clutter.texture, size=(cells, cells)).astype(np.float32)
        ground += np.asarray(Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (255 * ground.clip(0, 1)).astype(np.uint8)


def _cut(garment: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A square piece from around the middle of the picture, where there is garment."""
    side = len(garment)
    size = max(1, round(share * side))
    y, x = rng.integers(0, side - size, size=2, endpoint=True)
    return garment[y : y + size, x : x + size]


def _paste(
    scene: Image.Image, picture: np.ndarray, scale: float, rng: np.random.Generator
) -> np.ndarray:
    """Put a garment anywhere inside the scene, but for the black around it; gives the mask."""
    size = max(1, round(scale * SIDE))
    place = tuple(int(at) for at in rng.integers(0, SIDE - size, size=2, endpoint=True))
    to = (size, size)
    grey = Image.fromarray(picture).resize(to, Image.Resampling.BILINEAR)
    # A closed outline keeps the dark parts inside of a garment.
    outline = Image.fromarray((255 * (picture > _GARMENT)).astype(np.uint8))
    outline = outline.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MinFilter(3))
    mask = Image.new("L", scene.size)
    mask.paste(outline.resize(to, Image.Resampling.BILINEAR), place)
    whole = Image.new("L", scene.size)
    whole.paste(grey, place)
    scene.paste(whole, (0, 0), mask)
    return np.asarray(mask)
