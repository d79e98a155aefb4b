"""Drawings of patch groups, as pure functions of a picture and label maps.

A picture is an H×W×3 array of uint8; a map holds one value per patch, h×w, row by row. Nothing
ties the two sizes together but that the map covers the whole picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
Map = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: What stands where a patch is gone.
BLANK = np.array((232, 232, 232), dtype=np.uint8)
WHITE = (255, 255, 255)


def upsample(values: NDArray, size: tuple[int, int]) -> NDArray:
    """Give every pixel the value of its patch: h×w → H×W for ``size = (H, W)``."""
    rows, columns = (
        np.arange(pixels) * patches // pixels
        for pixels, patches in zip(size, values.shape, strict=False)
    )
    return values[rows[:, None], columns[None, :]]


def mask_patches(picture: Picture, masked: Mask) -> Picture:
    """Blank out some patches.

    Args:
        picture: H×W×3.
        masked: which patches, h×w.
    """
    return np.where(upsample(masked, picture.shape[:2])[..., None], BLANK, picture)


def darken_patches(picture: Picture, masked: Mask) -> Picture:
    """Some patches at a quarter of their light; arguments as :func:`mask_patches`."""
    return np.where(upsample(masked, picture.shape[:2])[..., None], picture // 4, picture)


def tint_groups(picture: Picture, group: Map, strength: float = 0.6) -> Picture:
    """Lay one colour over each group, on the picture in grey, with borders between groups.

    Args:
        picture: H×W×3.
        group: the group of each patch in ``0…K-1``, h×w.
        strength: opacity of the colours.
    """
    colours = _palette(int(group.max()) + 1)[upsample(group, picture.shape[:2])]
    grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
    mixed = np.round(strength * colours + (1 - strength) * grey).astype(np.uint8)
    return outline(mixed, group, np.ones_like(group, dtype=bool))


def fill_groups(
    picture: Picture,
    group: Map,
    pale: Mask | None = None,
    gone: Callable[[Picture, Mask], Picture] = mask_patches,
) -> Picture:
    """Show what a token set has kept of a picture.

    Patches that share a token are filled with the mean colour of all of them and bordered in white;
    a patch alone in its token shows the picture; dropped patches are blank, or what ``gone`` makes
    of them.

    Args:
        picture: H×W×3.
        group: the token that holds each patch, h×w; -1 where it was dropped.
        pale: patches to fade, h×w: those that wait outside the blocks.
        gone: how dropped patches are drawn.
    """
    size = picture.shape[:2]
    labels, compact = np.unique(group, return_inverse=True)
    compact = compact.reshape(group.shape)
    members = np.bincount(compact.ravel())
    merged = ((members > 1) & (labels >= 0))[compact]
    pixel = upsample(compact, size)
    count = np.bincount(pixel.ravel()).clip(min=1)
    mean = np.stack(
        [np.bincount(pixel.ravel(), picture[..., c].ravel()) / count for c in range(3)], axis=-1
    )
    out = np.where(
        upsample(merged, size)[..., None], np.round(mean).astype(np.uint8)[pixel], picture
    )
    if pale is not None and pale.any():
        faded = (out.astype(np.uint16) + 2 * np.array(WHITE, dtype=np.uint16)) // 3
        out = np.where(upsample(pale, size)[..., None], faded.astype(np.uint8), out)
    return outline(gone(out, group < 0), group, merged)


def outline(picture: Picture, group: Map, bordered: Mask) -> Picture:
    """White lines where two neighbouring patches belong to different groups and at least one is
    ``bordered``.

    Args:
        picture: H×W×3.
        group: the group of each patch, h×w.
        bordered: patches whose group gets a border, h×w.
    """
    (height, width), (rows, columns) = picture.shape[:2], group.shape
    y = -(-np.arange(rows + 1) * height // rows)  # the first pixel of each patch, as in upsample()
    x = -(-np.arange(columns + 1) * width // columns)
    thickness = max(
        1, round(min(height / rows / 10, width / columns / 10, height / 100, width / 100))
    )
    before, after = thickness // 2, thickness - thickness // 2 - 1
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    beside = (group[:, 1:] != group[:, :-1]) & (bordered[:, 1:] | bordered[:, :-1])
    for i, j in np.argwhere(beside):
        edge = x[j + 1]
        draw.rectangle((edge - before, y[i] - before, edge + after, y[i + 1] + after), fill=WHITE)
    below = (group[1:] != group[:-1]) & (bordered[1:] | bordered[:-1])
    for i, j in np.argwhere(below):
        edge = y[i + 1]
        draw.rectangle((x[j] - before, edge - before, x[j + 1] + after, edge + after), fill=WHITE)
    return np.asarray(image)


def _palette(count: int) -> NDArray[np.float64]:
    """Colours that stay apart, count×3, in 0…255: hue, lightness and saturation turn in cycles
    of their own.
    """
    colours = [
        colorsys.hls_to_rgb(k * 0.618034 % 1, (0.45, 0.6, 0.72)[k % 3], (0.85, 0.6)[k // 3 % 2])
        for k in range(count)
    ]
    return 255 * np.array(colours)
