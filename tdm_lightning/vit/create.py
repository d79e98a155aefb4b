"""Models by name, errors in this library's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torchvision
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from tdm_lightning.errors import FileError, SettingError, did_you_mean
from tdm_lightning.vit.find import find_vit

#: What the libraries raise for arguments that mean nothing to them.
_UNFIT = (
    *(RuntimeError, TypeError, ValueError, AssertionError),
    *(AttributeError, LookupError, ArithmeticError),
)

#: Arguments of the libraries' functions that load a file or let code run. They may come from a
#: config or a checkpoint of somebody else's, and weights have a way of their own.
_REFUSED = (
    "checkpoint_path",
    "pretrained",
    "pretrained_image_path",
    "pretrained_text_path",
    "trust_remote_code",
    "weights_only",
)


def create_vit(name: str, pretrained: bool = False, /, **arguments: Any) -> nn.Module:
    """A model of timm, or of the library that the name begins with.

    Args:
        name: timm's name of the model, ``torchvision:vit_b_16``, ``open_clip:ViT-B-32`` or
            ``hf:facebook/dinov2-small``; of the latter two it is the image encoder.
        pretrained: take the library's pretrained weights; of open_clip a name says which,
            ``open_clip:ViT-B-32/openai``.
        arguments: passed on, such as timm's ``img_size``; for ``hf:`` settings of its
            configuration, also of a kind of model alone: ``hf:dinov2``.

    Raises:
        ValueError: if the library has no model of that name, or not with these arguments, which may
            load no file and run no code of others; if it is not installed or not known here, or the
            pretrained weights cannot be had.
    """
    if refused := [key for key in _REFUSED if key in arguments]:
        raise SettingError(
            f"a model's arguments cannot hold {', '.join(refused)}: a model is made here without"
            " files and without code of others; weights= loads weights, true those of its library"
        )
    library, colon, rest = name.partition(":")
    try:
        if colon and library != "hf-hub":
            return _of_library(library, rest, pretrained, arguments)
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except SettingError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        files = "pretrained weights" if pretrained else "files"
        raise FileError(
            f"the {files} of {name} cannot be had: {error}. Check the name and the connection, or"
            " give the weights as a file"
        ) from error
    except _UNFIT as error:
        raise SettingError(_reason(name, arguments, error)) from error


def _of_library(library: str, name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    if library == "torchvision":
        weights = "DEFAULT" if pretrained else None
        return torchvision.models.get_model(name, weights=weights, **arguments)
    if library == "open_clip":
        try:
            from open_clip import create_model
        except ImportError as error:
            raise SettingError(
                "models of open_clip need it: pip install 'tdm-lightning[open_clip]'"
            ) from error
        model, _, tag = name.partition("/")
        if pretrained and not tag:
            raise SettingError(
                f"open_clip has several weights for {name}; say which, such as"
                f" 'open_clip:{name}/openai'"
            )
        return create_model(model, pretrained=tag if pretrained else None, **arguments).visual
    if library == "hf":
        return _of_transformers(name, pretrained, arguments)
    raise SettingError(
        f"no models are made of {library!r}: names begin with 'torchvision:', 'open_clip:', 'hf:',"
        " or are timm's"
    )


def _of_transformers(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """The image encoder of a model of transformers, by a hub name, a folder or a kind of model."""
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
    except ImportError as error:
        raise SettingError(
            "models of transformers need it: pip install 'tdm-lightning[huggingface]'"
        ) from error
    if pretrained:
        return find_vit(AutoModel.from_pretrained(name, trust_remote_code=False, **arguments))
    if name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name, **arguments)
    elif "/" in name or Path(name).is_dir():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    else:
        near = did_you_mean(name, list(CONFIG_MAPPING))
        raise SettingError(
            f"transformers has no kind of model {name!r}{near}; give one, such as 'hf:dinov2', a"
            " hub name, or a folder"
        )
    return find_vit(AutoModel.from_config(config, trust_remote_code=False))


def _reason(name: str, arguments: dict[str, Any], error: Exception) -> str:
    if ":" in name and not name.startswith("hf-hub:"):
        return f"cannot make a {name!r} with {arguments}: {error}"
    base = name.partition(".")[0].rpartition("/")[2]
    if "/" not in name and not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        return f"timm {timm.__version__} has no model {name!r}{hint}"
    return f"timm {timm.__version__} cannot make a {name!r} with {arguments}: {error}"
