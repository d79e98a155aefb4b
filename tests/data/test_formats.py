"""Every format, prepared and streamed, through the loaders of the data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_lightning import ImageNetDataModule
from tests.helpers.localsets import (
    COLOURS,
    NAMES,
    make_arrow,
    make_image_folder,
    make_parquet,
    make_table,
    make_webdataset,
)

MAKERS = {
    "imagefolder": make_image_folder,
    "parquet": make_parquet,
    "arrow": make_arrow,
    "webdataset": make_webdataset,
}
COLUMNS = {"webdataset": {"image_column": "jpg", "label_column": "cls"}}


def make_data(root: Path, location: Any, **options: Any) -> ImageNetDataModule:
    """The data module with small batches, in this process, for a tiny model."""
    settings = {
        "model": "test_vit",
        "model_kwargs": {"img_size": 32},
        "batch_size": 4,
        "num_workers": 0,
    }
    location = str(location) if isinstance(location, Path) else location
    return ImageNetDataModule(location, cache_dir=str(root / "cache"), **{**settings, **options})


def classes_seen(images: Tensor) -> Tensor:
    """The class whose colour each normalised image is nearest to."""
    colour = images.mean(dim=(2, 3)) * 0.5 + 0.5  # test_vit's mean and deviation
    return torch.cdist(colour, torch.tensor(COLOURS) / 255).argmin(dim=1)


@pytest.mark.usefixtures("no_wait_for_parquet")
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("format", MAKERS)
def test_every_format_gives_every_image_with_its_label(
    tmp_path: Path, format: str, streaming: bool
) -> None:
    root = MAKERS[format](tmp_path / "set")
    known = (
        3 if streaming and format == "webdataset" else None
    )  # a stream of plain integers does not tell
    data = make_data(
        tmp_path,
        root,
        streaming=streaming,
        num_classes=known,
        augment=False,
        **COLUMNS.get(format, {}),
    )
    assert data.num_classes == 3
    assert data.label_names == (None if format == "webdataset" else list(NAMES[:3]))
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert all(isinstance(batch, tuple) for batch in batches)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert images.shape == (18, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [6, 6, 6]
        assert torch.equal(classes_seen(images), labels)
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(labels) == (
        18 if streaming else 16
    )  # the last batch of two is left out where the size is known


@pytest.mark.parametrize("format", MAKERS)
def test_augmented_training_images_change_with_the_epoch(tmp_path: Path, format: str) -> None:
    data = make_data(tmp_path, MAKERS[format](tmp_path / "set"), **COLUMNS.get(format, {}))
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = next(iter(loader)), next(iter(loader))
    assert first[0].shape == (4, 3, 32, 32)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_files_patterns_and_lists(tmp_path: Path, format: str) -> None:
    root = MAKERS[format](tmp_path / "set")
    suffix = {"parquet": "parquet", "webdataset": "tar"}[format]
    train, val = f"{root}/train-*.{suffix}", f"{root}/validation-00000.{suffix}"
    columns = COLUMNS.get(format, {})
    data = make_data(tmp_path, {"train": train, "validation": [val]}, **columns)
    data.setup("fit")
    assert len(data.val_dataloader().dataset) == 9
    data = make_data(tmp_path, [train], val_split=None, **columns)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 18
    assert data.val_dataloader() == []
    assert make_data(tmp_path, val, **columns).num_classes == 3


def test_a_folder_for_each_split(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "set", splits=("one", "two"))
    data = make_data(tmp_path, {"train": f"{root}/one", "validation": f"{root}/two"})
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 18


@pytest.mark.parametrize("column", ["bytes", "paths"])
def test_columns_of_plain_bytes_or_paths(tmp_path: Path, column: str) -> None:
    root = make_image_folder(tmp_path / "set")
    files = sorted((root / "train").rglob("*.jpg"))
    from datasets import Dataset

    values = [file.read_bytes() if column == "bytes" else str(file) for file in files]
    Dataset.from_dict(
        {"picture": values, "kind": [NAMES.index(file.parent.name) for file in files]}
    ).to_parquet(tmp_path / "train.parquet")
    data = make_data(
        tmp_path,
        tmp_path / "train.parquet",
        image_column="picture",
        label_column="kind",
        val_split="train",
        num_classes=5,
    )
    data.setup("validate")
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(classes_seen(images), labels)
    assert data.num_classes == 5
    assert data.label_names is None


def test_prediction_needs_no_labels(tmp_path: Path) -> None:
    make_table().remove_columns("label").to_parquet(tmp_path / "test.parquet")
    data = make_data(
        tmp_path, {"test": str(tmp_path / "test.parquet")}, test_split="test", num_classes=3
    )
    assert data.label_names is None
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert sum(len(images) for images, _ in batches) == 18
    assert {label for _, labels in batches for label in labels.tolist()} == {-1}


def test_hold_out_is_stratified_and_repeatable(tmp_path: Path) -> None:
    root = make_parquet(tmp_path / "set")
    parts = []
    for seed in (0, 0, 1):
        data = make_data(tmp_path, root, val_holdout=1 / 3, seed=seed, augment=False)
        data.setup("fit")
        data.setup("test")
        images, labels = (torch.cat(part) for part in zip(*data.val_dataloader(), strict=True))
        assert labels.bincount().tolist() == [2, 2, 2]
        assert len(data.train_dataloader().dataset) == 12
        assert torch.equal(images, torch.cat([batch[0] for batch in data.test_dataloader()]))
        parts.append(images)
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


def test_wordnet_folders_are_named_in_words(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "set", classes=2)
    for split in root.iterdir():
        (split / "ant").rename(split / "n01440764")
        (split / "bee").rename(split / "n01443537")
    assert make_data(tmp_path, root).label_names == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    ]


def test_digits_are_real_stratified_and_always_the_same() -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    options = {
        "model": "test_vit",
        "model_kwargs": {"img_size": 8, "in_chans": 1},
        "crop_pct": 1.0,
        "num_workers": 0,
    }
    sets = []
    for seed in (0, 1):
        data = ImageNetDataModule(
            "digits", test_split="test", augment=False, seed=seed, batch_size=100, **options
        )
        assert data.num_classes == 10
        assert data.label_names == [str(digit) for digit in range(10)]
        data.setup("fit")
        data.setup("test")
        sets.append(
            [
                torch.cat([images for images, _ in loader])
                for loader in (data.val_dataloader(), data.test_dataloader())
            ]
        )
        assert [len(part) for part in sets[-1]] == [180, 360]
        assert len(data.train_dataloader().dataset) == 1257
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert labels.bincount().min() >= 34
    assert all(torch.equal(first, second) for first, second in zip(*sets, strict=True))
    bunch = load_digits()
    pixels = sets[0][1][:, 0] * 0.5 + 0.5  # test_vit's mean and deviation
    original = torch.from_numpy(np.round(bunch.images * 255 / 16) / 255).float()
    nearest = torch.cdist(pixels.flatten(1), original.flatten(1)).min(dim=1)
    assert nearest.values.max() < 1e-2
    assert torch.equal(labels, torch.from_numpy(bunch.target)[nearest.indices])
