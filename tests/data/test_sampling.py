"""Which images each process and worker sees, in which order; and the data module inside a
Trainer.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, SplitDict, SplitInfo
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tdm_lightning import ImageNetDataModule
from tdm_lightning.data.images import ImageDataset, ImageStream
from tdm_lightning.data.sampling import RepeatedAugmentation, stream_size
from tdm_lightning.data.transforms import (
    eval_transform,
    image_mode,
    resolve_config,
    train_transform,
)
from tests.helpers.localsets import make_arrow, make_parquet, make_table
from tests.helpers.trainers import QUIET


def make_data(root: Path, location: Any, **options: Any) -> ImageNetDataModule:
    settings = {
        "model": "test_vit",
        "model_kwargs": {"img_size": 32},
        "batch_size": 4,
        "num_workers": 0,
    }
    return ImageNetDataModule(
        str(location), cache_dir=str(root / "cache"), **{**settings, **options}
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_repeated_augmentation(processes: int) -> None:
    ranks = [list(RepeatedAugmentation(range(60), 3, rank, processes)) for rank in range(processes)]
    assert {len(rank) for rank in ranks} == {60 // processes}
    assert set(Counter(index % 60 for index in chain(*ranks)).values()) == {3}
    assert len(set(chain(*ranks))) == 60  # every copy is another
    sampler = RepeatedAugmentation(range(60), 3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(sampler) == list(RepeatedAugmentation(range(60), 3, seed=1))


def test_repeated_augmentation_through_the_loader(tmp_path: Path) -> None:
    data = make_data(
        tmp_path, make_parquet(tmp_path / "set"), repeated_augmentation=3, batch_size=6
    )
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [6, 6, 6]
    for images, labels in batches:
        assert labels[0] == labels[1] == labels[2]
        assert not torch.equal(
            images[0], images[1]
        )  # copies of an image, each augmented differently


def numbered(count: int, shards: int, split: str | None = "train") -> IterableDataset:
    """A stream of rows that carry their number, whose description tells its size if ``split`` is
    given.
    """
    stream = Dataset.from_dict({"image": list(range(count))}).to_iterable_dataset(num_shards=shards)
    if split is not None:
        stream.info.splits = SplitDict({split: SplitInfo(name=split, num_examples=count)})
    return stream


class Numbers:
    """Stands in for a row reader: the image is the row's number."""

    image_column = "image"

    def image(self, row: dict[str, int]) -> int:
        return row["image"]

    def transform(self, image: int) -> Tensor:
        return torch.tensor(float(image))

    def label(self, row: dict[str, int]) -> int:
        return row["image"]


def stream_loader(
    stream: IterableDataset,
    rank: int = 0,
    processes: int = 1,
    training: bool = True,
    **options: Any,
) -> Any:
    """The data module's loader of a stream in one of several processes."""
    data = ImageNetDataModule(
        "digits", streaming=True, **{"batch_size": 4, "num_workers": 0, **options}
    )
    limit = options.pop("limit", 1.0)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=processes, limit_train_batches=limit, current_epoch=0
    )  # type: ignore[assignment]
    return data._stream_loader("train" if training else "val", stream, Numbers())  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("shards", [2, 5, 6])
def test_processes_get_equally_many_batches_of_a_stream(shards: int, workers: int) -> None:
    stream = numbered(50, shards)
    assert stream_size(stream, "train") == 50
    loaders = [stream_loader(stream, rank, 2, num_workers=workers) for rank in range(2)]
    assert [loader.num_workers <= stream.num_shards for loader in loaders] == [True, True]
    batches = [[labels for _, labels in loader] for loader in loaders]
    assert [len(part) for part in batches] == [len(loader) for loader in loaders] == [6, 6]
    assert all(len(labels) == 4 for part in batches for labels in part)
    seen = [set(torch.cat(part).tolist()) for part in batches]
    assert not seen[0] & seen[1]


def test_evaluation_sees_every_image_of_a_stream_once() -> None:
    loaders = [
        stream_loader(numbered(50, 5), rank, 2, training=False, num_workers=2) for rank in range(2)
    ]
    numbers = [label for loader in loaders for _, labels in loader for label in labels.tolist()]
    assert sorted(numbers) == list(range(50))


def test_the_order_of_a_stream_changes_with_the_epoch_and_follows_the_seed() -> None:
    def passes(seed: int, workers: int) -> list[list[int]]:
        loader = stream_loader(numbered(48, 4), seed=seed, num_workers=workers)
        return [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]

    for workers in (0, 2):  # workers persist between the passes
        first, second = passes(0, workers)
        assert first != second
        assert sorted(first) == sorted(second) == list(range(48))
        assert passes(0, workers) == [first, second]
        assert passes(1, workers)[0] != first


def test_a_stream_of_unknown_size() -> None:
    stream = numbered(50, 5, split=None)
    loader = stream_loader(stream)
    with pytest.raises(TypeError, match="no length"):
        len(loader)
    assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == list(range(50))
    with pytest.raises(
        ValueError, match=r"does not tell how many images.*set trainer.limit_train_batches"
    ):
        stream_loader(stream, 0, 2)


def test_a_stream_of_unknown_size_goes_on_as_long_as_processes_need() -> None:
    data = ImageNetDataModule("digits", streaming=True, batch_size=4, num_workers=0)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=2, limit_train_batches=20, current_epoch=0
    )  # type: ignore[assignment]
    batches = iter(data._stream_loader("train", numbered(50, 5, split=None), Numbers()))  # type: ignore[arg-type]
    assert (
        len([next(batches) for _ in range(20)]) == 20
    )  # 80 images of the 25 that this process has


class Probe(LightningModule):
    """Counts what it is given; knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen: dict[str, int] = Counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"] += len(batch[1])
        return nn.functional.cross_entropy(self.layer(batch[0].mean(dim=(2, 3))), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["val"] += len(batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["test"] += len(batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return batch[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_in_a_trainer(tmp_path: Path, streaming: bool) -> None:
    data = make_data(tmp_path, make_arrow(tmp_path / "set"), streaming=streaming, eval_batch_size=6)
    probe = Probe()
    trainer = Trainer(
        **QUIET,
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(probe, data)
    trainer.test(probe, data, verbose=False)
    images = trainer.predict(probe, data)
    assert probe.seen == {"train": 36 if streaming else 32, "val": 36, "test": 18}
    assert [len(batch) for batch in images] == [6, 6, 6]


def test_hyperparameters_reload(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_parquet(tmp_path / "set"), crop_pct=0.875)
    trainer = Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Probe(), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = ImageNetDataModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.hparams == data.hparams


# Transforms


def test_the_data_config_follows_the_model_and_its_arguments() -> None:
    config = resolve_config("test_vit")
    assert config["input_size"] == (3, 160, 160)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 0.95
    assert resolve_config("test_vit", crop_pct=0.875)["crop_pct"] == 0.875
    assert resolve_config("test_vit", {"img_size": (32, 48)})["input_size"] == (3, 32, 48)
    assert resolve_config(None)["input_size"] == (3, 224, 224)
    grey = resolve_config("deit_tiny_patch16_224", {"img_size": 8, "in_chans": 1, "embed_dim": 64})
    assert grey["input_size"] == (1, 8, 8)
    assert grey["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert image_mode(grey) == "L"
    assert image_mode(config) == "RGB"


def test_the_centre_crop_keeps_the_share_asked_for() -> None:
    from PIL import Image

    picture = Image.new("L", (64, 64))
    picture.paste(
        255, (0, 0, 5, 64)
    )  # a white edge of 5 of 64 pixels, which a crop of 0.875 cuts off but for one
    for share, white in ((1.0, 5), (0.875, 1)):
        config = {
            **resolve_config("test_vit", {"img_size": 64, "in_chans": 1}, share),
            "interpolation": "nearest",
        }
        pixels = eval_transform(config)(picture)[0]
        assert int((pixels[32] > 0).sum()) == pytest.approx(white, abs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_recipe_of_deit_never_fails(channels: int) -> None:
    picture = make_table(classes=1, per_class=1)[0]["image"].convert(
        "L" if channels == 1 else "RGB"
    )
    config = resolve_config("test_vit", {"img_size": 16, "in_chans": channels})
    transform = train_transform(
        config, auto_augment="rand-m10-mstd0.5-inc1", re_prob=0.25
    )  # 10: posterize to 0 bits
    for _ in range(150):
        assert transform(picture).shape == (channels, 16, 16)


def test_the_augmentation_is_repeated_with_the_seed(tmp_path: Path) -> None:
    from lightning.pytorch import seed_everything

    root = make_parquet(tmp_path / "set")
    batches = []
    for seed in (3, 3, 4):
        seed_everything(seed, workers=True, verbose=False)
        data = make_data(tmp_path, root)
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader()))[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_the_augmentation_follows_from_pass_and_index(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_parquet(tmp_path / "set"))
    data.setup("fit")
    images = data.train_dataloader().dataset
    before = torch.get_rng_state()
    images.set_epoch(0)
    first, copy = images[0][0], images[len(images)][0]
    images.set_epoch(1)
    assert not torch.equal(images[0][0], first)
    assert not torch.equal(copy, first)
    images.set_epoch(0)
    assert torch.equal(images[0][0], first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_in_memory_gives_pairs(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_parquet(tmp_path / "set"))
    data.setup("fit")
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert isinstance(train, ImageDataset)
    image, label = val[0]
    assert image.shape == (3, 32, 32)
    assert label == 0
    data = make_data(tmp_path, tmp_path / "set", streaming=True)
    data.setup("fit")
    assert isinstance(data.train_dataloader().dataset, ImageStream)
