"""``python -m benchmarks.scenes``: make the set of scenes from Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray

from benchmarks.runner import run
from benchmarks.scenes.draw import Clutter, draw_scene
from tdm_lightning.data.sources import load_splits
from tdm_lightning.errors import SettingError
from tdm_lightning.visualize.sheet import make_folder

#: Scenes of each split, by default; every garment serves about as often as any other of its split.
_SCENES = {"train": 110_000, "validation": 4_000, "test": 6_000}
#: Garments of the training files that only validation scenes show.
_HELD_OUT = 5_000


def scenes(
    garments: str = "zalando-datasets/fashion_mnist",
    out: str = "scenes",
    train: int = _SCENES["train"],
    validation: int = _SCENES["validation"],
    test: int = _SCENES["test"],
    seed: int = 0,
) -> list[Path]:
    """Draw scenes of 56×56 pixels and write a parquet file for each split.

    The label is the class of the whole garment. No garment, and no piece of one, is in two splits:
    validation scenes show the last 5,000 of Fashion-MNIST's training files, test scenes its test
    files. A scene depends on the seed, its split and its number alone.

    Args:
        garments: Fashion-MNIST: a folder with its files, or its name on the hub.
        out: folder to write.
        train: scenes to train on.
        validation: scenes to choose by.
        test: scenes to report on.
        seed: of everything random.

    Returns:
        The files.

    Raises:
        ValueError: if the set is not there, or too small.
    """
    found: Any = load_splits(garments)
    pictures = {name: np.stack([np.asarray(p) for p in found[name]["image"]]) for name in found}
    labels = {name: np.asarray(found[name]["label"]) for name in found}
    if len(labels["train"]) <= _HELD_OUT:
        raise SettingError(
            f"{garments!r} holds {len(labels['train'])} training images; more than {_HELD_OUT} are"
            " needed, as in Fashion-MNIST"
        )
    parts = {
        "train": ("train", slice(None, -_HELD_OUT), train),
        "validation": ("train", slice(-_HELD_OUT, None), validation),
        "test": ("test", slice(None), test),
    }
    folder, written = make_folder(out), []
    names = [str(index) for index in range(int(labels["train"].max()) + 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for number, (split, (source, part, count)) in enumerate(parts.items()):
        drawn = draw_split(pictures[source][part], labels[source][part], count, (seed, number))
        rows = [{"image": fromarray(scene), "label": label} for scene, label in drawn]
        path = folder / f"{split}.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
        written.append(path)
        print(path)
    return written


def draw_split(
    pictures: np.ndarray, labels: np.ndarray, count: int, seed: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, int]]:
    """Scenes and the classes of their garments.

    Args:
        pictures: the split's garments, n×H×W, bytes.
        labels: their classes, n.
        count: scenes to draw.
        seed: with a scene's number, all that it depends on.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    most = Clutter().pieces[1]
    for number in range(count):
        rng = np.random.default_rng((*seed, number))
        index = order[number % len(order)]
        drawn = rng.integers(0, len(labels), size=8 * most)
        others = drawn[labels[drawn] != labels[index]][:most]
        yield draw_scene(pictures[index], list(pictures[others]), rng), int(labels[index])


if __name__ == "__main__":
    run(scenes)
