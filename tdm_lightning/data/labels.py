"""What the columns hold: images, classes and their names."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import ClassLabel, Features, Image, Value
from timm.data import ImageNetInfo

from tdm_lightning.errors import DataError, SettingTypeError

_RAW_IMAGES = ("binary", "large_binary", "string", "large_string")


def check_columns(features: Features, image_column: str, label_column: str | None) -> None:
    """Refuse a set whose columns are not there or hold something else.

    Args:
        features: the set's columns.
        image_column: name of the one with images, encoded bytes or paths.
        label_column: name of the one with classes; ``None``: not needed.

    Raises:
        ValueError: if a column is missing.
        TypeError: if it holds the wrong thing.
    """
    for column, kind in ((image_column, "image"), (label_column, "label")):
        if column is not None and column not in features:
            without = "; images without labels can only be predicted" if kind == "label" else ""
            raise DataError(
                f"the data set has no {kind} column {column!r}; "
                f"its columns are {', '.join(map(repr, features))}: set {kind}_column{without}"
            )
    image = features[image_column]
    raw = isinstance(image, dict) and {"bytes", "path"} & set(image)
    if not (
        isinstance(image, Image) or raw or (isinstance(image, Value) and image.dtype in _RAW_IMAGES)
    ):
        raise SettingTypeError(
            f"column {image_column!r} must hold images, encoded bytes or paths, but holds"
            f" {_type_name(image)}"
        )
    if label_column is None or isinstance(features[label_column], ClassLabel):
        return
    label = features[label_column]
    if not isinstance(label, Value) or "int" not in label.dtype:
        raise SettingTypeError(
            f"column {label_column!r} must hold classes as integers or ClassLabel, but holds"
            f" {_type_name(label)}; datasets' class_encode_column turns names into classes"
        )


def class_names(features: Features, label_column: str) -> list[str] | None:
    """Names of the classes where the column knows them; ImageNet's WordNet identifiers are put into
    words.

    >>> class_names(Features({"label": ClassLabel(names=["n01440764", "n01443537"])}), "label")
    ['tench, Tinca tinca', 'goldfish, Carassius auratus']
    """
    label = features.get(label_column)
    if not isinstance(label, ClassLabel):
        return None
    info = ImageNetInfo()
    if set(label.names) <= set(info.label_names()):
        return [info.label_name_to_description(name) for name in label.names]
    return list(label.names)


def check_classes(
    train: Iterable[int], other: Iterable[int], split: str | None, names: list[str] | None
) -> None:
    """Refuse to train where there is nothing to tell apart, or where evaluation asks for classes
    that were never seen.

    Args:
        train: the labels of the training images.
        other: the labels that occur in another split.
        split: what that split is called.
        names: names of the classes, if known.

    Raises:
        ValueError: if the sets of classes do not fit.
    """

    def named(labels: Iterable[int]) -> str:
        listed = [
            repr(names[label]) if names and 0 <= label < len(names) else str(label)
            for label in sorted(labels)
        ]
        return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")

    seen = set(train)
    unseen = set(other) - seen
    if unseen:
        raise DataError(
            f"the splits have different classes: {split!r} has {named(unseen)}, which the training"
            f" split (with {named(seen)}) lacks; every class needs training images"
        )
    if len(seen) < 2:
        raise DataError(
            f"all training images have one class, {named(seen)}; expected at least two (in a"
            " folder: one subfolder per class)"
        )


def _type_name(feature: object) -> str:
    return feature.dtype if isinstance(feature, Value) else repr(feature)
