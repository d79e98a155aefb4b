"""Bad data: one message that says what was wrong and how to mend it."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

from tdm_lightning.data import ImageNetDataModule, sources
from tdm_lightning.data.transforms import resolve_config
from tdm_lightning.errors import DataError
from tests.helpers.localsets import (
    NAMES,
    make_image_folder,
    make_parquet,
    make_table,
    make_webdataset,
)


def make_data(root: Path, location: Any, **options: Any) -> ImageNetDataModule:
    settings = {
        "model": "test_vit",
        "model_kwargs": {"img_size": 32},
        "batch_size": 4,
        "num_workers": 0,
    }
    location = str(location) if isinstance(location, Path) else location
    return ImageNetDataModule(location, cache_dir=str(root / "cache"), **{**settings, **options})


@pytest.mark.parametrize("name", ["missing", "missing/*.parquet", "missing.tar"])
def test_a_place_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"missing.*(no such file|no file matches).*expected"):
        make_data(tmp_path, tmp_path / name).setup("fit")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty'.*no images, .parquet.*laid out SPLIT/CLASS/IMAGE"
    ):
        make_data(tmp_path, tmp_path / "empty").setup("fit")


def test_a_folder_without_files_of_the_given_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .tar files there, which format 'webdataset' expects"):
        make_data(tmp_path, make_parquet(tmp_path / "set"), format="webdataset").setup("fit")


def test_one_class_in_training_and_others_in_validation(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "set", classes=1, splits=("train",))
    make_image_folder(tmp_path / "set", classes=3, splits=("validation",))
    with pytest.raises(
        ValueError, match=r"different classes: 'validation' has 'bee', 'cat', which .*'ant'.* lacks"
    ):
        make_data(tmp_path, tmp_path / "set").setup("fit")


def test_one_class_in_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have one class, 'ant'; expected at least two"):
        make_data(tmp_path, make_image_folder(tmp_path / "set", classes=1)).setup("fit")


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_name_those_there_are(tmp_path: Path, streaming: bool) -> None:
    root = make_webdataset(tmp_path / "set")
    with pytest.raises(
        ValueError, match=r"no image column 'image'; its columns are 'jpg', 'cls'.*set image_column"
    ):
        make_data(tmp_path, root, streaming=streaming).setup("fit")
    with pytest.raises(
        ValueError, match=r"no label column 'label'; its columns are 'jpg', 'cls'.*set label_column"
    ):
        make_data(tmp_path, root, image_column="jpg", streaming=streaming).setup("fit")
    with pytest.raises(ValueError, match="no label column 'label'"):
        _ = make_data(tmp_path, root, image_column="jpg", streaming=streaming).num_classes


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    root = make_parquet(tmp_path / "set")
    with pytest.raises(
        ValueError, match=r"no split 'val'; its splits are 'train', 'validation'.*val_holdout"
    ):
        make_data(tmp_path, root, val_split="val").setup("fit")
    with pytest.raises(ValueError, match="no images to evaluate on: set val_split or test_split"):
        make_data(tmp_path, root, val_split=None).setup("test")


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    table = make_table().remove_columns("label")
    table.add_column("label", list(NAMES[:3]) * 6).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        TypeError,
        match=r"'label' must hold classes as integers or ClassLabel, but holds string; .*encode",
    ):
        make_data(tmp_path, tmp_path / "train.parquet").setup("fit")
    with pytest.raises(
        TypeError, match="'label' must hold images, encoded bytes or paths, but holds ClassLabel"
    ):
        make_data(tmp_path, make_parquet(tmp_path / "set"), image_column="label").setup("fit")


@pytest.mark.parametrize("label", [-1, 3, None])
def test_labels_out_of_range(tmp_path: Path, label: int | None) -> None:
    table = make_table(named=False).remove_columns("label")
    table.add_column("label", [0, 1, label] * 6).to_parquet(tmp_path / "test.parquet")
    data = make_data(
        tmp_path, {"test": str(tmp_path / "test.parquet")}, test_split="test", num_classes=3
    )
    data.setup("test")
    with pytest.raises(ValueError, match=rf"holds the label {label}, but labels must lie in 0…2"):
        list(data.test_dataloader())


def test_a_stream_of_integers_does_not_tell_the_classes(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_parquet(tmp_path / "set", named=False), streaming=True)
    with pytest.raises(ValueError, match="does not tell how many classes .* set num_classes"):
        _ = data.num_classes


def test_a_file_that_is_not_of_its_format(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*train.parquet' as parquet"):
        make_data(tmp_path, tmp_path / "train.parquet").setup("fit")


# The hub


def gated() -> GatedRepoError:
    return GatedRepoError(
        "401 Client Error", response=SimpleNamespace(status_code=401, headers={}, request=None)
    )  # type: ignore[arg-type]


def gated_as_datasets_raises_it() -> DatasetNotFoundError:
    error = DatasetNotFoundError(
        "Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub. You must be authenticated."
    )
    error.__cause__ = gated()
    return error


@pytest.mark.parametrize("function", ["load_dataset", "load_dataset_builder"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            gated(),
            (
                r"'ILSVRC/imagenet-1k' is"
                r" gated.*https://huggingface.co/datasets/ILSVRC/imagenet-1k.*hf auth login"
            ),
        ),
        (gated_as_datasets_raises_it(), r"is gated.*accept its terms at .*hf auth login"),
        (
            DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub."),
            "nor a data set you can see",
        ),
        (
            OfflineModeIsEnabled("Cannot reach"),
            r"hub cannot be reached \(Cannot reach\); check the network",
        ),
        (
            ConnectionError("Couldn't reach 'x' on the Hub"),
            r"hub cannot be reached .*check the network, or give a local path",
        ),
    ],
    ids=["gated", "gated by datasets", "unknown", "offline", "unreachable"],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, function: str, error: Exception, expected: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources, function, refuse)
    data = ImageNetDataModule()
    with pytest.raises(ValueError, match=expected):
        data.prepare_data() if function == "load_dataset" else data.num_classes


def test_a_name_that_is_nowhere_without_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"'nobody/nothing' is neither a file .* nor in the cache.*check the network",
    ):
        make_data(tmp_path, "nobody/nothing").prepare_data()


def test_the_description_of_a_set_on_the_hub_tells_the_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Builder:
        info = make_table().info

    monkeypatch.setattr(sources, "load_dataset_builder", lambda *_, **__: Builder)
    data = ImageNetDataModule()
    assert data.num_classes == 3
    assert data.label_names == list(NAMES[:3])


# Images that cannot be decoded


def corrupt_set(root: Path, *indices: int) -> Path:
    table = make_table()
    images = list(table.cast_column("image", datasets.Image(decode=False))["image"])
    for index in indices:
        images[index] = {"bytes": images[index]["bytes"][:50], "path": None}
    columns = {"image": images, "label": list(table["label"])}
    for split in ("train", "validation"):
        Dataset.from_dict(columns, features=table.features).save_to_disk(root / split)
    return root


def test_a_corrupt_image_is_reported_and_left_out_of_evaluation(tmp_path: Path) -> None:
    data = make_data(tmp_path, corrupt_set(tmp_path / "set", 5), max_corrupt_images=1)
    data.setup("validate")
    loader = data.val_dataloader()
    with pytest.warns(
        UserWarning,
        match=r"image 5 of split 'validation' cannot be decoded .*skipped; 1 of at most 1",
    ):
        labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [label for index, label in enumerate([0, 1, 2] * 6) if index != 5]
    assert sum(len(labels) for _, labels in loader) == 17  # met again, but counted once


def test_a_batch_without_an_image_is_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path, corrupt_set(tmp_path / "set", 4, 5, 6, 7))
    data.setup("validate")
    with pytest.warns(UserWarning, match="image 7"):
        assert [len(labels) for _, labels in data.val_dataloader()] == [4, 4, 4, 2]


def test_training_takes_the_next_image_instead(tmp_path: Path) -> None:
    data = make_data(
        tmp_path, corrupt_set(tmp_path / "set", 4, 5, 17), batch_size=18, augment=False
    )
    data.setup("fit")
    with pytest.warns(UserWarning, match="image 17 of split 'train'"):
        ((images, labels),) = data.train_dataloader()
    assert images.shape[0] == 18
    assert labels.bincount().tolist() == [
        9,
        5,
        4,
    ]  # 4 and 5 became 6, and 17 became 0: all of class 0


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, streaming: bool, workers: int
) -> None:
    # A worker that has failed is waited for in vain, five seconds each time.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)
    data = make_data(
        tmp_path,
        corrupt_set(tmp_path / "set", 1, 3, 8),
        max_corrupt_images=2,
        streaming=streaming,
        num_workers=workers,
    )
    data.setup("validate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="corrupt images so far: 3, max_corrupt_images: 2"):
            list(data.val_dataloader())
    gc.collect()  # the error holds on to the loader


def test_nothing_but_corrupt_images(tmp_path: Path) -> None:
    data = make_data(tmp_path, corrupt_set(tmp_path / "set", *range(18)), max_corrupt_images=100)
    data.setup("fit")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="none of the 18 images of split 'train'"),
    ):
        list(data.train_dataloader())


def test_a_stream_skips_and_names_the_file(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "set")
    (root / "validation" / "bee" / "3.jpg").write_bytes(b"no image")
    data = make_data(tmp_path, root, streaming=True)
    data.setup("validate")
    loader = data.val_dataloader()
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"image \d+ of worker 0's stream, .*3.jpg, .*; 1 of at most 10"
        ):
            assert sum(len(labels) for _, labels in loader) == 17


# Settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"max_corrupt_images": -1}, "max_corrupt_images must be at least 0"),
        ({"num_classes": 0}, "num_classes must be at least 2"),
        ({"crop_pct": 1.5}, r"crop_pct must lie in \(0, 1\]"),
        ({"val_holdout": 1.0}, r"val_holdout must lie in \[0, 1\)"),
        ({"streaming": True, "val_holdout": 0.1}, "val_holdout picks images by index"),
        (
            {"streaming": True, "repeated_augmentation": 3},
            "repeated_augmentation picks images by index",
        ),
        ({"model": "test_vot"}, r"timm \S+ has no model 'test_vot'; did you mean test_vit"),
        ({"model_kwargs": {"in_chans": 4}}, "3 or 1 channels, but in_chans is 4"),
        ({"model_kwargs": {"in_chans": [3]}}, r"3 or 1 channels, but in_chans is \[3\]"),
        ({"model_kwargs": {"img_size": 0.5}}, "img_size must be a number of pixels, .* got 0.5"),
        ({"model_kwargs": {"img_size": [32]}}, "height and width as two, got .32."),
        ({"model_kwargs": {"img_size": "32"}}, "height and width as two, got '32'"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ImageNetDataModule("digits", **options)


def test_models_of_other_libraries() -> None:
    assert resolve_config("torchvision:vit_b_16") == resolve_config(None)
    with pytest.raises(DataError, match="'hf:dinov2' is no model of timm's or torchvision's"):
        resolve_config("hf:dinov2")


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of 'hub', 'imagefolder'.*, got 'zip'"):
        make_data(tmp_path, tmp_path, format="zip").prepare_data()
