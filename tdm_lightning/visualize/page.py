"""A page on which one points at a patch and sees its token: one HTML file that asks for nothing
from the network.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tdm_lightning.core import Role
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import write_bytes
from tdm_lightning.visualize.story import Layer, Story

#: What a block did with a patch, after the words "block 4".
ROLES = {
    Role.KEPT: "passed it on as it is",
    Role.MATCHED: "merged it with tokens like it",
    Role.CLUSTERED: "merged it with other inattentive tokens",
    Role.DROPPED: "dropped it",
    Role.PARKED: "lets it wait outside",
}


def page(stories: Sequence[Story], title: str) -> str:
    """The page's text. What it shows lies in it as JSON, see :func:`contents`.

    Args:
        stories: of one image, under one method or several on models of equal depth.
        title: the heading.

    Raises:
        ValueError: if there is no story, or their depths or patches differ.
    """
    template = files("tdm_lightning.visualize").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(contents(stories), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # nothing in it may end the script
    return template.replace("{title}", html.escape(title)).replace("{data}", data)


def save_page(path: str | Path, stories: Sequence[Story], title: str) -> Path:
    """Write a :func:`page`.

    Raises:
        ValueError: as there, or if the file cannot be written.
    """
    return write_bytes(path, page(stories, title).encode())


def contents(stories: Sequence[Story]) -> dict[str, Any]:
    """What a page shows, as plain values.

    ``picture`` has the image as a data URI and its size in pixels, ``grid`` rows and columns of
    patches, ``roles`` the words for each :class:`~tdm_lightning.core.Role`, and ``methods`` for
    each story its ``title``, ``tokens`` and ``layers``: ``block``, and for each patch, row by row,
    ``group``, ``role`` and ``importance`` as :class:`~tdm_lightning.visualize.story.Layer` has
    them, NaN as null.

    Raises:
        ValueError: if there is no story, or their depths or patches differ.
    """
    if len({(story.depth, story.layers[0].group.shape) for story in stories}) != 1:
        raise SettingError("a page needs methods on models of one depth and as many patches")
    picture = stories[0].picture
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return {
        "picture": {"source": source, "width": picture.shape[1], "height": picture.shape[0]},
        "grid": list(stories[0].layers[0].group.shape),
        "roles": [ROLES[role] for role in Role],
        "methods": [
            {
                "title": story.title,
                "tokens": story.tokens,
                "layers": [_plain(layer) for layer in story.layers],
            }
            for story in stories
        ],
    }


def _plain(layer: Layer) -> dict[str, Any]:
    scores = None
    if layer.importance is not None:
        # Six digits: more than one wants to read, and half the file.
        scores = [
            None if np.isnan(score) else float(f"{score:.6g}")
            for score in layer.importance.ravel().tolist()
        ]
    return {
        "block": layer.block,
        "group": layer.group.ravel().tolist(),
        "role": layer.role.ravel().tolist(),
        "importance": scores,
    }
