"""``tdm visualize IMAGE…``: draw what becomes of an image's patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tdm_lightning.cli.models import choose_model
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Strategy


def visualize(
    images: list[str],
    ckpt_path: str | None = None,
    model: str = "deit_small_patch16_224",
    model_kwargs: dict[str, Any] | None = None,
    strategy: Strategy | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    random_weights: bool = False,
    out: str = "panels",
    layer: int = -1,
    together: bool = False,
) -> list[Path]:
    """Draw the panels of image files: original, importance-based, diversity-based, reduced, and the
    reducing blocks one by one.

    Args:
        images: image files.
        ckpt_path: a checkpoint of ``tdm fit``; it brings model and strategy along.
        model: otherwise, the name of a timm ViT.
        model_kwargs: passed to ``timm.create_model``.
        strategy: the token-reduction method; ``None``: that of the checkpoint, or TDM at 0.7.
        pretrained: take timm's pretrained weights.
        checkpoint: take the weights in this file, an official checkpoint or one of ``tdm fit``.
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

    if not (ckpt_path or pretrained or checkpoint or random_weights):
        raise SettingError(
            "an untrained model's attention means nothing: give --ckpt_path FILE, --pretrained true"
            " or --checkpoint FILE, or insist with --random_weights true"
        )
    reduced = choose_model(
        ckpt_path, None, model, model_kwargs, strategy, pretrained, checkpoint
    ).model
    with torch.inference_mode():
        written = visualize_images(images, reduced, out, layer, together=together)
    for path in written:
        print(path)
    return written
