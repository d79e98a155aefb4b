"""Garments of a split, and scenes made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.scenes.draw import Clutter, draw_scene
from tdm_lightning.data.sources import load_splits
from tdm_lightning.errors import SettingError

#: Garments of the training files that only validation scenes show.
_HELD_OUT = 5_000
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Garments:
    """The garments that a split may show.

    Attributes:
        pictures: n×H×W, bytes.
        labels: their classes, n.
        number: of the split, part of every seed.
    """

    pictures: np.ndarray
    labels: np.ndarray
    number: int


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: H×W, bytes.
        mask: where the whole garment is, H×W, bytes.
        label: the class of that garment.
    """

    image: np.ndarray
    mask: np.ndarray
    label: int


def read_garments(location: str) -> dict[str, Garments]:
    """Fashion-MNIST in three parts: no garment is in two of them.

    Args:
        location: a folder with its files, or its name on the hub.

    Raises:
        ValueError: if the set is not there, or too small.
    """
    found: Any = load_splits(location)
    pictures = {name: np.stack([np.asarray(p) for p in found[name]["image"]]) for name in found}
    labels = {name: np.asarray(found[name]["label"]) for name in found}
    if len(labels["train"]) <= _HELD_OUT:
        raise SettingError(
            f"{location!r} holds {len(labels['train'])} training images; more than {_HELD_OUT} are"
            " needed, as in Fashion-MNIST"
        )
    parts = (
        ("train", slice(None, -_HELD_OUT)),
        ("train", slice(-_HELD_OUT, None)),
        ("test", slice(None)),
    )
    return {
        split: Garments(pictures[source][part], labels[source][part], number)
        for number, (split, (source, part)) in enumerate(zip(SPLITS, parts, strict=True))
    }


def draw_scenes(garments: Garments, first: int, count: int, seed: int = 0) -> Iterator[Scene]:
    """Scenes ``first`` to ``first + count - 1`` of a split; each garment serves as often as others.

    A scene depends on the seed, its split and its number alone.
    """
    base = (seed, garments.number)
    labels, most = garments.labels, Clutter().pieces[1]
    for number in range(first, first + count):
        turn, place = divmod(number, len(labels))
        index = _order(len(labels), (*base, turn))[place]
        rng = np.random.default_rng((*base, turn, place))
        drawn = rng.integers(0, len(labels), size=8 * most)
        others = drawn[labels[drawn] != labels[index]][:most]
        image, mask = draw_scene(garments.pictures[index], list(garments.pictures[others]), rng)
        yield Scene(image, mask, int(labels[index]))


@cache
def _order(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)
