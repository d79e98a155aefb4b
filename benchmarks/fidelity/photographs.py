"""Photographs that come with scikit-learn and scikit-image, and crops of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tdm_lightning.errors import SettingError

_SCIKIT_IMAGE = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
#: A crop's area, of the photograph's, and its sides' ratio.
_SCALE, _RATIO = (0.15, 0.9), (3 / 4, 4 / 3)


def photographs() -> dict[str, Image.Image]:
    """Eight photographs by name, RGB.

    Raises:
        ValueError: if one of the packages is not installed.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise SettingError(
            "the photographs come with scikit-learn and scikit-image: pip install"
            f" 'tdm-lightning[benchmarks]' ({error})"
        ) from error
    bundled = load_sample_images()
    found = {
        Path(name).stem: image
        for name, image in zip(bundled.filenames, bundled.images, strict=True)
    }
    found |= {name: getattr(data, name)() for name in _SCIKIT_IMAGE}
    return {name: Image.fromarray(image).convert("RGB") for name, image in found.items()}


def crops(photos: dict[str, Image.Image], count: int, seed: int, config: dict[str, Any]) -> Tensor:
    """Random crops, as many of each photograph as of any other, half of them mirrored.

    Args:
        photos: by name.
        count: how many in all.
        seed: they depend on nothing else.
        config: size, mean and the like, as ``timm.data.create_transform`` takes them.

    Returns:
        B×3×H×W.
    """
    from timm.data import create_transform

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    random.seed(seed)  # timm's crops draw from Python's generator
    prepare = create_transform(
        **config, is_training=True, scale=_SCALE, ratio=_RATIO, color_jitter=None, hflip=0.5
    )
    pictures = list(photos.values())
    found = [prepare(pictures[number % len(pictures)]) for number in range(count)]
    torch.set_rng_state(state)
    return torch.stack(found)
