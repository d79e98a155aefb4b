"""The images that a search looks at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tdm_lightning.errors import SettingError, SettingTypeError


def take_images(loader: Iterable[Any], most: int, like: Tensor) -> list[Tensor]:
    """The first images of a loader, in its batches.

    Args:
        loader: gives images, B×C×H×W, or pairs of them and something else.
        most: number of images to take; fewer where it has fewer.
        like: gives device and dtype.

    Raises:
        ValueError: if it has none.
        TypeError: if it gives something else than images.
    """
    batches, left = [], most
    for batch in loader:
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(images, Tensor) or images.ndim != 4:
            shape = f" of shape {tuple(images.shape)}" if isinstance(images, Tensor) else ""
            raise SettingTypeError(
                "a search looks at batches of images, B×C×H×W, or pairs (images, labels); the"
                f" loader gave a {type(images).__name__}{shape}"
            )
        batches.append(images[:left].to(like))
        left -= len(batches[-1])
        if left <= 0:
            break
    if left == most:
        raise SettingError(
            "a search needs images, and the loader has none: give it some training images"
        )
    return batches
