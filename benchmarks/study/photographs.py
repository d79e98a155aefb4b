"""Photographs that come with scikit-learn and scikit-image."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tdm_lightning.errors import SettingError

_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket")


def photographs() -> dict[str, Image.Image]:
    """Photographs by name, RGB.

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
