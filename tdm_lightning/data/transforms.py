"""timm's transforms, resolved from what a model was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import timm
from PIL.Image import Image
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import posterize
from timm.models import get_pretrained_cfg
from torch import Tensor

from tdm_lightning.errors import DataError, did_you_mean

Transform = Callable[[Image], Tensor]
_MODES = {1: "L", 3: "RGB"}

#: Images of a model that tells nothing about them; mean and deviation are ImageNet's.
_USUAL = {"input_size": (3, 224, 224)}


def resolve_config(
    model: str | None, model_kwargs: Mapping[str, Any] | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """How a timm model wants its images.

    Args:
        model: timm's name of the model; ``None``: ImageNet's usual 224² with mean and deviation of
            ImageNet.
        model_kwargs: what the model is created with; ``img_size`` and ``in_chans`` count here.
        crop_pct: share of the resized image that the centre crop keeps, in place of the model's
            own.

    Returns:
        timm's data config: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
        ``crop_mode``.

    Raises:
        ValueError: if timm does not know the model, or it takes neither RGB nor grey images.

    >>> resolve_config("test_vit", {"img_size": 32, "in_chans": 1})["input_size"]
    (1, 32, 32)
    """
    kwargs = model_kwargs or {}
    cfg: dict[str, Any] = dict(_USUAL) if model is None else _pretrained_cfg(model)
    channels, height, width = cfg["input_size"]
    channels = kwargs.get("in_chans", channels)
    size = kwargs.get("img_size") or (height, width)
    height, width = _sides(size)
    if channels not in tuple(_MODES):
        raise DataError(
            "images are read as RGB or grey, so a model takes 3 or 1 channels, but in_chans is"
            f" {channels}"
        )
    chosen = {"input_size": (channels, height, width), "crop_pct": crop_pct}
    return resolve_data_config(chosen, pretrained_cfg=_grey(cfg, channels))


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, which may be given as one number."""
    sides = (size, size) if isinstance(size, int) else size
    pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not pair or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(
            f"img_size must be a number of pixels, or height and width as two, got {size!r}"
        )
    return sides[0], sides[1]


def _pretrained_cfg(model: str) -> dict[str, Any]:
    library, colon, _ = model.partition(":")
    if library == "torchvision":
        return dict(_USUAL)
    if colon and library not in ("hf-hub", "local-dir"):
        raise DataError(
            f"{model!r} is no model of timm's or torchvision's, which images are prepared for here"
        )
    if colon:  # these tell in their own files
        return dict(timm.create_model(model).pretrained_cfg)  # type: ignore[arg-type]
    cfg = get_pretrained_cfg(model)
    if cfg is None:
        hint = did_you_mean(model, timm.list_models())
        raise DataError(f"timm {timm.__version__} has no model {model!r}{hint}")
    return cfg.to_dict()


def _grey(cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The statistics of a grey image: those of the colours on average."""
    if channels != 1:
        return dict(cfg)
    config = resolve_data_config(pretrained_cfg=dict(cfg))
    return {**cfg, **{name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}}


def image_mode(config: Mapping[str, Any]) -> str:
    """PIL's mode that images are converted to: ``"RGB"`` or ``"L"``."""
    return _MODES[config["input_size"][0]]


def eval_transform(config: Mapping[str, Any]) -> Transform:
    """Resize, centre crop and normalise."""
    return create_transform(**config)


def train_transform(
    config: Mapping[str, Any], interpolation: str | None = None, **augmentation: Any
) -> Transform:
    """Random crops and what ``augmentation`` names, see ``timm.data.create_transform``; random
    erasing fills with noise.
    """
    chosen = {**config, "interpolation": interpolation or config["interpolation"]}
    return _fix_posterize(
        create_transform(**chosen, is_training=True, re_mode="pixel", **augmentation)
    )


def _fix_posterize(transform: Any) -> Any:
    """Timm's strongest posterize keeps 0 bits, which Pillow 13 refuses."""
    for step in transform.transforms:
        for operation in getattr(step, "ops", None) or chain.from_iterable(
            getattr(step, "policy", ())
        ):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    return posterize(image, bits) if bits > 0 else image.point(lambda _: 0)
