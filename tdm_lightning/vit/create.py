"""timm's models by name, its errors in this library's words."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from tdm_lightning.errors import FileError, SettingError


def create_vit(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """``timm.create_model``.

    Args:
        name: timm's name of the model.
        pretrained: take timm's pretrained weights.
        arguments: passed on, such as ``img_size``.

    Raises:
        ValueError: if timm has no model of that name, or not with these arguments, or the
            pretrained weights cannot be had.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileError(
            f"the pretrained weights of {name} cannot be downloaded: {error}. Check the connection,"
            " or give the weights as a file"
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise SettingError(_reason(name, arguments, error)) from error


def _reason(name: str, arguments: dict[str, Any], error: Exception) -> str:
    base = name.partition(".")[0].rpartition("/")[2]
    if "/" not in name and not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), 3, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return f"timm {timm.__version__} has no model {name!r}{hint}"
    return f"timm {timm.__version__} cannot make a {name!r} with {arguments}: {error}"
