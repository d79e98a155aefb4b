"""Small image classification sets on disk, in every format that the data module reads.

Each image has one colour per class, so that a batch tells whether images and labels still belong
together.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL.Image import fromarray

SPLITS = ("train", "validation")
NAMES = ("ant", "bee", "cat", "dog", "elk")
COLOURS = ((230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20), (20, 230, 230))


def encode(label: int, index: int, size: int = 48, suffix: str = "jpeg") -> bytes:
    """An encoded image of its class's colour, with a little noise."""
    noise = np.random.default_rng(1000 * label + index).integers(-10, 10, (size, size + 8, 3))
    buffer = io.BytesIO()
    fromarray((np.array(COLOURS[label]) + noise).astype(np.uint8)).save(buffer, suffix)
    return buffer.getvalue()


def samples(classes: int = 3, per_class: int = 6, size: int = 48) -> Iterator[tuple[bytes, int]]:
    """Encoded images and labels, class by class in turn."""
    for index in range(per_class):
        for label in range(classes):
            yield encode(label, index, size), label


def make_image_folder(
    root: Path, classes: int = 3, per_class: int = 6, size: int = 48, splits: Sequence[str] = SPLITS
) -> Path:
    """``SPLIT/CLASS/INDEX.jpg``."""
    for split in splits:
        for label in range(classes):
            folder = root / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                (folder / f"{index}.jpg").write_bytes(encode(label, index, size))
    return root


def make_table(classes: int = 3, per_class: int = 6, size: int = 48, named: bool = True) -> Dataset:
    """A set in memory; ``named``: its labels are a ``ClassLabel``, otherwise plain integers."""
    images, labels = zip(*samples(classes, per_class, size), strict=True)
    label = ClassLabel(names=list(NAMES[:classes])) if named else Value("int64")
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": list(labels)}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": label}))


def make_parquet(
    root: Path,
    classes: int = 3,
    per_class: int = 6,
    size: int = 48,
    shards: int = 2,
    named: bool = True,
) -> Path:
    """``SPLIT-SHARD.parquet``."""
    root.mkdir(parents=True, exist_ok=True)
    table = make_table(classes, per_class, size, named)
    for split in SPLITS:
        for shard in range(shards):
            table.shard(shards, shard).to_parquet(root / f"{split}-{shard:05}.parquet")
    return root


def make_arrow(
    root: Path, classes: int = 3, per_class: int = 6, size: int = 48, shards: int = 2
) -> Path:
    """``SPLIT/data-*.arrow``, as ``Dataset.save_to_disk`` writes them."""
    for split in SPLITS:
        make_table(classes, per_class, size).save_to_disk(root / split, num_shards=shards)
    return root


def make_webdataset(
    root: Path, classes: int = 3, per_class: int = 6, size: int = 48, shards: int = 2
) -> Path:
    """``SPLIT-SHARD.tar`` with files ``INDEX.jpg`` and ``INDEX.cls``."""
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for shard in range(shards):
            with tarfile.open(root / f"{split}-{shard:05}.tar", "w") as tar:
                for index, (image, label) in list(enumerate(samples(classes, per_class, size)))[
                    shard::shards
                ]:
                    for suffix, content in (("jpg", image), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{index:06}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return root
