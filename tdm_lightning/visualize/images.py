"""From image files to what a model sees, and from there back to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tdm_lightning.errors import SettingError
from tdm_lightning.flops import default_input_size
from tdm_lightning.visualize.draw import Picture
from tdm_lightning.vit.find import inner_vit

#: Shortest side of a panel, in pixels.
SIDE = 448


def data_config(model: nn.Module, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Timm's data config of a model, for the image size and channels that it was really made with.

    Args:
        model: a reduced model, or a plain timm ViT.
        size: height and width, for models that take several; the model's own by default.
    """
    from timm.data import resolve_model_data_config

    channels, *own = default_input_size(model)
    config = resolve_model_data_config(inner_vit(model))
    statistics = {name: config[name] for name in ("mean", "std")}
    if len(config["mean"]) != channels:  # a grey image has the statistics of the colours on average
        statistics = {
            name: (sum(values) / len(values),) * channels for name, values in statistics.items()
        }
    return {**config, **statistics, "input_size": (channels, *(size or own))}


def open_image(path: str | Path) -> Image.Image:
    """Read a whole image file.

    Raises:
        ValueError: if there is no such file, or it is no image that Pillow can decode.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingError(
            f"cannot read {str(path)!r} as an image: {error}; give the path of a picture (PNG,"
            " JPEG, …)"
        ) from error


def prepare(image: Image.Image, config: dict[str, Any]) -> tuple[Tensor, Picture]:
    """An image as a model sees it, and the same view as a picture for panels.

    The picture is cut from the original in a larger size, so that panels are sharp where the
    original is.

    Args:
        image: any size.
        config: timm's data config, see :func:`data_config`.

    Returns:
        The normalised image, C×H×W, and the picture, H'×W'×3 with H' and W' the same multiple
        of H and W.
    """
    from timm.data import create_transform

    channels, height, width = config["input_size"]
    image = image.convert("L" if channels == 1 else "RGB")
    times = enlargement(height, width)
    view = create_transform(
        **{**config, "input_size": (channels, times * height, times * width)}, normalize=False
    )(image)
    return create_transform(**config)(image), _rgb(view.permute(1, 2, 0).numpy())


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """A normalised image, C×H×W, as a picture large enough for a panel."""
    scale = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    levels = (
        (image.detach().cpu().float() * scale[0] + scale[1]).clamp(0, 1).mul(255).round().byte()
    )
    picture = _rgb(levels.permute(1, 2, 0).numpy())
    times = enlargement(*picture.shape[:2])
    # Interpolation would turn a picture of a few pixels into fog.
    method = Image.Resampling.BICUBIC if times <= 4 else Image.Resampling.NEAREST
    size = times * picture.shape[1], times * picture.shape[0]
    return np.asarray(Image.fromarray(picture).resize(size, method))


def enlargement(height: int, width: int) -> int:
    """The whole number of times that an image must grow for its shorter side to reach :data:`SIDE`
    pixels.
    """
    return max(1, -(-SIDE // min(height, width)))


def _rgb(levels: Picture) -> Picture:
    """H×W×1 or H×W×3 as H×W×3."""
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))
