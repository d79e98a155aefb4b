"""Models by name, errors in this library's words."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torchvision
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from tdm_lightning.errors import FileError, SettingError


def create_vit(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A model of timm, or of the library that the name begins with.

    Args:
        name: timm's name of the model, ``torchvision:vit_b_16``, or ``open_clip:ViT-B-32``, of
            which it is the image tower.
        pretrained: take the library's pretrained weights; of open_clip a name says which,
            ``open_clip:ViT-B-32/openai``.
        arguments: passed on, such as timm's ``img_size``.

    Raises:
        ValueError: if the library has no model of that name, or not with these arguments, is not
            installed or not known here, or the pretrained weights cannot be had.
    """
    library, colon, rest = name.partition(":")
    try:
        if colon and library != "hf-hub":
            return _of_library(library, rest, pretrained, arguments)
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except SettingError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileError(
            f"the pretrained weights of {name} cannot be downloaded: {error}. Check the connection,"
            " or give the weights as a file"
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
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
    raise SettingError(
        f"no models are made of {library!r}: names begin with 'torchvision:', 'open_clip:', or are"
        " timm's"
    )


def _reason(name: str, arguments: dict[str, Any], error: Exception) -> str:
    if ":" in name and not name.startswith("hf-hub:"):
        return f"cannot make a {name!r} with {arguments}: {error}"
    base = name.partition(".")[0].rpartition("/")[2]
    if "/" not in name and not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), 3, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return f"timm {timm.__version__} has no model {name!r}{hint}"
    return f"timm {timm.__version__} cannot make a {name!r} with {arguments}: {error}"
