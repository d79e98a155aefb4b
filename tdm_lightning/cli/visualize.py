"""``tdm visualize IMAGE…``: draw what becomes of an image's patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tdm_lightning.cli.models import check_trained, choose_model
from tdm_lightning.strategies import Strategy


def visualize(
    images: list[str],
    weights: bool | str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    strategy: Strategy | None = None,
    random_weights: bool = False,
    out: str = "panels",
    layer: int = -1,
    together: bool = False,
) -> list[Path]:
    """Draw the panels of image files: original, importance-based, diversity-based, reduced, and the
    reducing blocks one by one.

    Args:
        images: image files.
        weights: a checkpoint of ``tdm fit``, a folder that ``save_pretrained`` wrote or a hub
            repository, which bring along what is not given of model and strategy; an official
            checkpoint; or ``true`` for timm's pretrained weights.
        model: the name of a ViT: timm's, ``torchvision:…``, ``open_clip:…`` or ``hf:…``.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: that of the weights, or TDM at 0.7.
        random_weights: draw with an untrained model all the same; its attention means nothing.
        out: folder for the PNG files, one an image.
        layer: which reducing block the panels show, counted among them; -1: the last.
        together: write one ``panels.png``, an image in each row, without the blocks one by one.

    Returns:
        The files written.

    Raises:
        ValueError: without trained weights, for an image that cannot be read or a folder that
            cannot be written.
    """
    from tdm_lightning.visualize import visualize_images

    check_trained(weights, random_weights, "an untrained model's attention means nothing")
    reduced = choose_model(weights, model, model_kwargs, strategy).model
    with torch.inference_mode():
        written = visualize_images(images, reduced, out, layer, together=together)
    for path in written:
        print(path)
    return written
