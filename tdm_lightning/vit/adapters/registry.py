"""Which adapter takes which model."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch import nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.errors import SettingError, SettingTypeError, UnsupportedModelError
from tdm_lightning.vit.adapters.base import Adapter, Size

_ADAPTERS: dict[type[nn.Module], Adapter] = {}

#: Classes of libraries that are not imported here, by their full names: the file of this folder
#: that has their adapter, and its name there. It is imported when a model of theirs is met.
_LAZY = {
    "open_clip.transformer.VisionTransformer": "open_clip_vit.ADAPTER",
    "torchvision.models.vision_transformer.VisionTransformer": "torchvision_vit.ADAPTER",
} | {
    f"transformers.models.{module}.{name}": f"huggingface{adapter}"
    for module, names, adapter in (
        ("beit.modeling_beit", "BeitModel", "_beit.BEIT"),
        ("clip.modeling_clip", "CLIPVisionModel", ".ADAPTER"),
        ("data2vec.modeling_data2vec_vision", "Data2VecVisionModel", "_beit.DATA2VEC"),
        ("deit.modeling_deit", "DeiTModel", ".ADAPTER"),
        ("dinov2.modeling_dinov2", "Dinov2Model Dinov2Backbone", ".ADAPTER"),
        (
            "dinov2_with_registers.modeling_dinov2_with_registers",
            "Dinov2WithRegistersModel Dinov2WithRegistersBackbone",
            ".ADAPTER",
        ),
        ("dinov3_vit.modeling_dinov3_vit", "DINOv3ViTModel DINOv3ViTBackbone", ".ADAPTER"),
        ("ijepa.modeling_ijepa", "IJepaModel", ".ADAPTER"),
        ("siglip.modeling_siglip", "SiglipVisionModel", ".ADAPTER"),
        ("siglip2.modeling_siglip2", "Siglip2VisionModel", "_siglip2.ADAPTER"),
        ("vit.modeling_vit", "ViTModel", ".ADAPTER"),
        ("vit_mae.modeling_vit_mae", "ViTMAEModel", ".ADAPTER"),
        ("vit_msn.modeling_vit_msn", "ViTMSNModel", ".ADAPTER"),
    )
    for name in names.split()
}

#: Methods by which a model runs. A subclass that has its own runs in a way that no adapter knows.
_FORWARDS = ("forward", "forward_features")


def register_adapter(cls: type[nn.Module], adapter: Adapter | type[Adapter]) -> None:
    """Let models of a class, and of subclasses that run in the same way, be reduced.

    Args:
        cls: the model's class.
        adapter: its adapter, or the adapter's class.

    Raises:
        TypeError: if ``cls`` is no module class, or ``adapter`` is none or lacks a method.
        ValueError: if the class has an adapter already.
    """
    if not inspect.isclass(cls) or not issubclass(cls, nn.Module):
        raise SettingTypeError(
            f"register_adapter() takes a model class first, a subclass of nn.Module, got {cls!r}"
        )
    kind = adapter if inspect.isclass(adapter) else type(adapter)
    if not issubclass(kind, Adapter):
        raise SettingTypeError(f"adapter must be an Adapter or a subclass of it, got {adapter!r}")
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise SettingTypeError(
            f"{kind.__name__} cannot take {cls.__name__} apart: it lacks {', '.join(missing)}"
        )
    if cls in _ADAPTERS:
        raise SettingError(
            f"{cls.__module__}.{cls.__name__} has an adapter already,"
            f" {type(_ADAPTERS[cls]).__name__}; subclass the model to give yours another"
        )
    _ADAPTERS[cls] = adapter if isinstance(adapter, Adapter) else kind()


def find_adapter(vit: object) -> Adapter | None:
    """The adapter of a model; ``None``: there is none."""
    kind = _registered(type(vit))
    return None if kind is None else _ADAPTERS[kind]


def _registered(cls: type) -> type[nn.Module] | None:
    """The class itself, or the nearest one that it comes from, that has an adapter."""
    for kind in cls.__mro__:
        found = _LAZY.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None and kind not in _ADAPTERS:
            file, _, name = found.partition(".")
            register_adapter(kind, getattr(import_module(f"{__package__}.{file}"), name))
        if kind in _ADAPTERS:
            return kind
    return None


def adapter_for(vit: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        TypeError: if there is none, or the model runs in another way than the class that the
            adapter is for; the message says so.
    """
    kind = _registered(type(vit))
    if kind is not None:
        for name in _FORWARDS:
            if getattr(type(vit), name, None) is not getattr(kind, name, None):
                raise UnsupportedModelError(
                    f"{type(vit).__name__} has its own {name}(), so it runs in another way than"
                    f" {kind.__name__}; register an adapter for it with register_adapter()"
                )
        return _ADAPTERS[kind]
    known = ", ".join(kind.__name__ for kind in _ADAPTERS)
    raise UnsupportedModelError(
        f"{type(vit).__name__} is none of the ViT classes that have an adapter: {known}; another"
        " class is added with register_adapter()"
    )


def class_names() -> list[str]:
    """Full names of the model classes that have an adapter, those of libraries that are not
    imported included.
    """
    made = {f"{kind.__module__}.{kind.__qualname__}" for kind in _ADAPTERS}
    return sorted(made | _LAZY.keys())


def supported_classes() -> tuple[type[nn.Module], ...]:
    """The model classes that have an adapter; subclasses that run in the same way are taken too."""
    return tuple(_ADAPTERS)


# What other rooms ask of a model, whichever library it comes from.


def model_info(vit: Any) -> ModelInfo:
    """A model in numbers, at the image size that it was made for."""
    return adapter_for(vit).info(vit)


def grid_size(vit: nn.Module, size: Size) -> Size:
    """Rows and columns of patches that a model makes of an image of ``size`` pixels."""
    return adapter_for(vit).grid(vit, size)


def input_size(vit: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a model was made for."""
    return adapter_for(vit).input_size(vit)


def patch_count(vit: nn.Module) -> int:
    """Number of patches at the image size that a model was made for."""
    rows, columns = grid_size(vit, input_size(vit)[1:])
    return rows * columns
