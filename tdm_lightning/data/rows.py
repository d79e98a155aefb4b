"""One split of a set: chosen, checked, and with its images still encoded."""

from __future__ import annotations

from typing import TypeAlias

import datasets
from datasets import Features

from tdm_lightning.data.labels import check_columns
from tdm_lightning.data.sources import Splits
from tdm_lightning.errors import DataError

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def features_of(rows: Rows) -> Features:
    """The columns of a split; a stream without a description tells by its first rows."""
    return rows.features if rows.features is not None else rows._resolve_features().features


def choose_split(splits: Splits, split: str) -> Rows:
    """A split by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if split not in splits:
        raise DataError(
            f"the data set has no split {split!r}; its splits are {', '.join(map(repr, splits))}:"
            " set train_split, val_split and test_split, or val_holdout to validate on a part of"
            " the training images"
        )
    return splits[split]


def encoded(rows: Rows, split: str, image_column: str, label_column: str | None) -> Rows:
    """The two columns that count; images are left encoded, so that one which cannot be decoded is
    known by its index.

    Args:
        rows: the split.
        split: what it is called.
        image_column: name of the column with images.
        label_column: name of the column with classes; ``None``: leave labels out.

    Raises:
        ValueError: if a column is missing or the split is empty.
        TypeError: if a column holds the wrong thing.
    """
    features = features_of(rows)
    check_columns(features, image_column, label_column)
    if isinstance(rows, datasets.Dataset) and len(rows) == 0:
        raise DataError(f"split {split!r} of the data set is empty")
    rows = rows.select_columns(
        [image_column] if label_column is None else [image_column, label_column]
    )
    if isinstance(features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def hold_out(
    rows: datasets.Dataset, share: float, label_column: str, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off a share of the rows, the same of every class of a ``ClassLabel`` column; gives the
    rest and the share.

    Raises:
        ValueError: if the share cannot hold every class.
    """
    by_class = (
        label_column if isinstance(rows.features[label_column], datasets.ClassLabel) else None
    )
    try:
        halves = rows.train_test_split(share, stratify_by_column=by_class, seed=seed)
    except ValueError as error:
        raise DataError(
            f"val_holdout={share} of {len(rows)} images cannot hold the same share of every class:"
            f" {error}"
        ) from error
    return halves["train"], halves["test"]
