"""What a model makes of one image, block by block: the one source of animations, pages and contact
sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdm_lightning.core import LayerTrace, Role
from tdm_lightning.visualize.draw import Map, Picture, darken_patches, fill_groups
from tdm_lightning.visualize.panels import look, patch_map
from tdm_lightning.vit import TokenReducedViT


@dataclass(frozen=True)
class Layer:
    """Where the patches are after a reducing block.

    Attributes:
        block: which, from 1 as the papers count; 0: the patches as they enter the first.
        group: the token that holds each patch, h×w; -1 where it was dropped.
        role: :class:`~tdm_lightning.core.Role` of each patch, h×w.
        importance: the score by which the block judged the token that held each patch until then,
            h×w; NaN where there was none. ``None``: the method scores nothing.
    """

    block: int
    group: Map
    role: Map
    importance: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Story:
    """One image under one method.

    Attributes:
        title: what the method is called.
        picture: the image as the model sees it, in a larger size, H×W×3.
        tokens: patch tokens before the first block and after each; one more than there are blocks.
        layers: the patches as they enter, and after each reducing block.
    """

    title: str
    picture: Picture
    tokens: list[int]
    layers: list[Layer] = field(repr=False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.tokens) - 1

    def at(self, block: int) -> Layer:
        """Where the patches are after a block, counted from 1."""
        return [layer for layer in self.layers if layer.block <= block][-1]

    def drawn(self, block: int) -> Picture:
        """The tokens after a block: merged ones in their mean colour within white borders, dropped
        patches dark, waiting ones pale.
        """
        layer = self.at(block)
        return fill_groups(self.picture, layer.group, layer.role == Role.PARKED, darken_patches)


def tell(model: TokenReducedViT, image: Tensor | Image.Image, title: str | None = None) -> Story:
    """Follow the patches of one image through a model.

    Args:
        model: a reduced model; its mode and gradients are left alone.
        image: as :func:`~tdm_lightning.visualize.panels` takes it, as are the errors.
        title: what to call the method; ``None``: the strategy's name.
    """
    picture, _, trace, grid = look(model, image)
    patches = grid[0] * grid[1]
    start = Layer(0, np.arange(patches).reshape(grid), np.full(grid, int(Role.KEPT)))
    layers = [start]
    for seen in trace.layers:
        layers.append(_layer(seen, layers[-1].group, grid))
    counts = [int(n if isinstance(n, int) else n[0]) for n in trace.token_counts]
    name = title or type(model.strategy).__name__
    return Story(name, picture, [patches, *counts], layers)


def _layer(seen: LayerTrace, before: Map, grid: tuple[int, int]) -> Layer:
    scores = None
    if seen.importance is not None:
        known = seen.importance[0].detach().double().cpu().numpy()
        # The last is for patches that were gone before.
        scores = np.append(known, np.nan)[np.where(before < len(known), before, -1)]
    return Layer(
        seen.index + 1, patch_map(seen.assignment, grid), patch_map(seen.role, grid), scores
    )
