"""Image sets in MNIST's IDX files, such as Fashion-MNIST from a Linux distribution's package."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL.Image import fromarray

from tdm_lightning.errors import DataError

_SPLITS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def is_idx_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is one of MNIST's, compressed or not."""
    return Path(path).name.removesuffix(".gz").endswith((_IMAGES, _LABELS))


def load_idx_splits(folder: str | os.PathLike[str]) -> DatasetDict:
    """The splits ``train`` and ``test`` of a folder that holds ``train-images-idx3-ubyte`` and the
    like, perhaps as ``.gz``.

    Images are grey; labels are numbered from 0 and named by their numbers, since the files hold no
    names.

    Raises:
        ValueError: if a file is missing, is no IDX file, or images and labels differ in number.
    """
    return DatasetDict(
        {split: _split(Path(folder).expanduser(), prefix) for split, prefix in _SPLITS.items()}
    )


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, in its own shape.

    Raises:
        ValueError: if the file holds something else or ends early.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    # Two zero bytes, the element type (8: unsigned byte), the number of dimensions, their
    # big-endian sizes, the elements.
    head = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\0\0\x08" or len(content) < head:
        raise DataError(f"{str(path)!r} is no IDX file of bytes")
    shape = np.frombuffer(content[4:head], dtype=">u4")
    if len(content) - head != shape.prod():
        raise DataError(
            f"{str(path)!r} should hold {shape.prod()} bytes after its head and holds"
            f" {len(content) - head}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _split(folder: Path, prefix: str) -> Dataset:
    images, labels = (read_idx(_found(folder, f"{prefix}-{kind}")) for kind in (_IMAGES, _LABELS))
    if len(images) != len(labels):
        raise DataError(
            f"{str(folder)!r} holds {len(images)} images and {len(labels)} labels under {prefix}-*"
        )
    names = [str(index) for index in range(int(labels.max()) + 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict(
        {"image": [fromarray(image) for image in images], "label": labels}, features=features
    )


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{str(folder)!r} has neither {name} nor {name}.gz, which format 'idx' expects")
