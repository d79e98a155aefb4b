"""The LightningDataModule: any image classification set that ``datasets`` reads, prepared for a
timm model.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from tdm_lightning.core.checks import check_count
from tdm_lightning.core.randomness import run_seed
from tdm_lightning.data.images import CorruptImages, ImageDataset, ImageStream, RowReader, collate
from tdm_lightning.data.labels import check_classes, check_columns, class_names
from tdm_lightning.data.loader import ImageLoader, Standing
from tdm_lightning.data.rows import Rows, choose_split, encoded, features_of, hold_out
from tdm_lightning.data.sampling import (
    RepeatedAugmentation,
    TrainingSampler,
    batches_per_process,
    shard_stream,
    stream_size,
)
from tdm_lightning.data.sources import Location, Splits, hub_features, load_splits
from tdm_lightning.data.transforms import (
    Transform,
    eval_transform,
    image_mode,
    resolve_config,
    train_transform,
)
from tdm_lightning.errors import DataError


class ImageNetDataModule(LightningDataModule):
    """Image classification data by Hugging Face ``datasets``. Batches are ``(images B×C×H×W
    float32, labels B int64)``.

    The images are prepared as the timm model's own data config says; training uses DeiT's
    augmentation. To change either, override :meth:`train_transform` or :meth:`eval_transform`.

    An image that cannot be decoded is reported with its index and skipped: training takes the next
    one in its place, evaluation leaves it out. Under DDP every process gets equally many training
    batches: map-style sets are padded; streams give each process ``size // (batch_size ×
    processes)`` batches, starting over where a process's shards are shorter, if the set's
    description tells its size, and otherwise need an integer ``trainer.limit_train_batches``. In
    evaluation a stream gives every image once, map-style sets are padded likewise.

    Order and augmentation of training images follow from the run's seed (``seed_everything``),
    ``seed``, epoch and index, on any number of workers and processes: a run that goes on within an
    epoch sees what it would have seen. Streams that tell their size do so on as many of them as
    before, see :class:`~tdm_lightning.data.loader.ImageLoader`.

    Args:
        dataset: name on the Hugging Face hub; a folder (of images as ``SPLIT/CLASS/IMAGE``, or of
            parquet, arrow or webdataset files); a file, a glob pattern or a list of them (all in
            the split ``train``); those by split, as in ``{train: "a/*.parquet", validation:
            "b/*.parquet"}``; or ``"digits"``, scikit-learn's 8×8 digits.
        format: ``hub``, ``imagefolder``, ``parquet``, ``arrow``, ``webdataset``, ``idx`` (MNIST's
            files) or ``digits``; ``None``: by what is there.
        name: configuration of a set on the hub that has several.
        image_column: name of the column with images, encoded bytes or paths; in webdatasets a file
            extension like ``jpg``.
        label_column: name of the column with classes, ``ClassLabel`` or integers from 0; in
            webdatasets for instance ``cls``.
        train_split: name of the split to train on.
        val_split: name of the split to validate on; ``None``: no validation.
        test_split: name of the split to test and predict on; ``None``: the validation split, as is
            usual for ImageNet, whose test images have no labels. Images in a folder without
            subfolders have no labels: they can be predicted.
        val_holdout: share of the training images, stratified, to validate on in place of
            ``val_split``; 0: none.
        streaming: read while training, without preparing a copy first; shuffles in a buffer, uses
            at most a worker per shard.
        shuffle_buffer: encoded images among which a stream is shuffled, per worker.
        num_classes: number of classes; ``None``: what the labels say. Needed for streams of plain
            integers.
        model: timm's name of the model that the images are for; ``None``: 224² with ImageNet's
            mean and deviation.
        model_kwargs: what the model is created with: ``img_size`` and ``in_chans`` count here; 1
            channel: grey images.
        crop_pct: share of the resized image that evaluation's centre crop keeps; ``None``: the
            model's own. Papers use 0.875.
        augment: ``False`` prepares training images like those of evaluation.
        auto_augment: timm's name of an augmentation policy; ``None``: none.
        color_jitter: strength of colour jitter, where ``auto_augment`` is ``None``.
        hflip: probability of a horizontal flip.
        scale: smallest and largest share of an image's area that a random crop takes.
        ratio: smallest and largest aspect ratio of a random crop.
        interpolation: of random crops, such as ``bicubic`` or ``random``; ``None``: the model's
            own.
        re_prob: probability of random erasing.
        repeated_augmentation: copies of an image per epoch (DeiT: 3), the epoch keeping its length;
            0: off.
        max_corrupt_images: images that may be skipped, per split and process, before it is an
            error.
        batch_size: images per training batch, per process.
        eval_batch_size: images per batch otherwise; ``None``: the same.
        num_workers: worker processes that load images; 0: none.
        pin_memory: pin batches in memory where there is an accelerator.
        persistent_workers: keep the workers from epoch to epoch.
        cache_dir: where prepared copies are kept; ``None``: datasets' own place.
        seed: of the hold-out; and, added to the run's own, of the order and augmentation of
            training images.

    Raises:
        ValueError: for a setting out of range, or from :meth:`setup` for data that is missing or
            does not fit.
        TypeError: for columns that do not hold images and classes.
    """

    hparams: Any

    def __init__(
        self,
        dataset: Location = "ILSVRC/imagenet-1k",
        format: str | None = None,
        name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = "validation",
        test_split: str | None = None,
        val_holdout: float = 0.0,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        num_classes: int | None = None,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        crop_pct: float | None = None,
        augment: bool = True,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.3,
        hflip: float = 0.5,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str | None = None,
        re_prob: float = 0.25,
        repeated_augmentation: int = 0,
        max_corrupt_images: int = 10,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        pin_memory: bool = True,
        persistent_workers: bool = True,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count(batch_size, "batch_size")
        check_count(shuffle_buffer, "shuffle_buffer")
        for count, what in (
            (num_workers, "num_workers"),
            (max_corrupt_images, "max_corrupt_images"),
        ):
            check_count(count, what, least=0)
        check_count(repeated_augmentation, "repeated_augmentation", least=0)
        if eval_batch_size is not None:
            check_count(eval_batch_size, "eval_batch_size")
        if num_classes is not None:
            check_count(num_classes, "num_classes", least=2)
        if not 0 <= val_holdout < 1:
            raise DataError(
                f"val_holdout must lie in [0, 1), a share of the training images, got {val_holdout}"
            )
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise DataError(f"crop_pct must lie in (0, 1], got {crop_pct}")
        if streaming and (val_holdout or repeated_augmentation):
            what = "val_holdout" if val_holdout else "repeated_augmentation"
            raise DataError(
                f"{what} picks images by index, which a stream does not have: set {what}=0 or"
                " streaming=false"
            )
        # Not logged: `model` and `num_classes` are also hyperparameters of the LightningModule,
        # with other values.
        self.save_hyperparameters(logger=False)
        self.data_config = resolve_config(model, model_kwargs, crop_pct)
        self._rows: dict[str, Rows] = {}

    # What a subclass may replace

    def train_transform(self) -> Transform:
        """Makes a tensor of a training image."""
        hp = self.hparams
        if not hp.augment:
            return self.eval_transform()
        names = ("auto_augment", "color_jitter", "hflip", "scale", "ratio", "re_prob")
        return train_transform(
            self.data_config, hp.interpolation, **{name: hp[name] for name in names}
        )

    def eval_transform(self) -> Transform:
        """Makes a tensor of an image of the other splits."""
        return eval_transform(self.data_config)

    # Classes

    @property
    def num_classes(self) -> int:
        """Number of classes, known before there is a trainer.

        Raises:
            ValueError: if it is not given and the data does not tell or has a single class, or as
                :meth:`setup`.
        """
        hp = self.hparams
        if hp.num_classes is not None:
            return hp.num_classes
        if self._class_names is not None:
            if len(self._class_names) < 2:
                raise DataError(
                    f"all images have one class, {self._class_names[0]!r}; expected at least two"
                    " (in a folder: one subfolder per class); such images can only be predicted"
                )
            return len(self._class_names)
        rows = choose_split(self._splits, hp.train_split)
        check_columns(features_of(rows), hp.image_column, hp.label_column)
        if not isinstance(rows, datasets.Dataset):
            raise DataError(
                f"a stream does not tell how many classes column {hp.label_column!r} has: set"
                " num_classes"
            )
        return max(rows.unique(hp.label_column)) + 1

    @property
    def has_classes(self) -> bool:
        """Whether the number of classes is given, or the images have labels of more than one."""
        if self.hparams.num_classes is not None:
            return True
        if self._class_names is not None:
            return len(self._class_names) > 1
        return self.hparams.label_column in features_of(next(iter(self._splits.values())))

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes; ``None`` where the data has none or another number of them than
        ``num_classes``.
        """
        names = self._class_names
        return names if names is not None and len(names) == self.num_classes else None

    @cached_property
    def _class_names(self) -> list[str] | None:
        hp = self.hparams
        features = hub_features(hp.dataset, hp.format, hp.name, hp.cache_dir)
        if features is None:
            features = features_of(next(iter(self._splits.values())))
        return class_names(features, hp.label_column)

    @cached_property
    def _splits(self) -> Splits:
        hp = self.hparams
        return load_splits(hp.dataset, hp.format, hp.name, hp.streaming, hp.cache_dir)

    # Splits

    def prepare_data(self) -> None:
        """Download and prepare the set; Lightning calls this in one process per machine."""
        _ = self._splits

    def setup(self, stage: str) -> None:
        """Open and check the splits of a stage.

        Raises:
            ValueError: if a split or column is missing, or the splits' classes do not fit.
            TypeError: if a column holds the wrong thing.
        """
        hp = self.hparams
        if stage != "fit":
            self._open({"validate": "val"}.get(stage, stage))
            return
        train = self._open("train")
        val = self._open("val") if self._validates else None
        if isinstance(train, datasets.Dataset):
            seen = train.unique(hp.label_column)
            other = seen if val is None or hp.val_holdout else val.unique(hp.label_column)
            check_classes(seen, other, hp.val_split, self._class_names)

    @property
    def _validates(self) -> bool:
        return bool(self.hparams.val_holdout) or self.hparams.val_split is not None

    def _open(self, stage: str) -> Rows:
        """The rows of ``train``, ``val``, ``test`` or ``predict``, opened once; those to predict
        need no labels.
        """
        if stage not in self._rows:
            hp = self.hparams
            held_out = self._held_out(stage)
            split = self._split_name(stage)
            labels = hp.label_column if stage != "predict" or held_out else None
            rows = encoded(choose_split(self._splits, split), split, hp.image_column, labels)
            if held_out:
                rest, held = hold_out(rows, hp.val_holdout, hp.label_column, hp.seed)
                rows = rest if stage == "train" else held
            self._rows[stage] = rows
        return self._rows[stage]

    def _held_out(self, stage: str) -> bool:
        """Whether it is one of the two parts of the training split."""
        return bool(self.hparams.val_holdout) and (
            stage in ("train", "val") or self.hparams.test_split is None
        )

    def _split_name(self, stage: str) -> str:
        hp = self.hparams
        if stage == "train" or self._held_out(stage):
            return hp.train_split
        split = hp.val_split if stage == "val" or hp.test_split is None else hp.test_split
        if stage == "predict" and len(self._splits) == 1:  # a folder of images, say
            split = next(iter(self._splits))
        if split is None:
            raise DataError("there are no images to evaluate on: set val_split or test_split")
        return split

    # Loaders

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented training images; in a Trainer, from where its training stands.

        Raises:
            ValueError: as :meth:`setup`; for a stream of unknown size in several processes without
                a number of batches.
        """
        loader = self._loader("train", self.train_transform())
        if self.trainer is not None:
            loader.follow(self.trainer)
        return loader

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Validation images in their order; an empty list where there is no validation split."""
        return self._loader("val", self.eval_transform()) if self._validates else []

    def test_dataloader(self) -> ImageLoader:
        """Test images in their order."""
        return self._loader("test", self.eval_transform())

    def predict_dataloader(self) -> ImageLoader:
        """The test images without their labels: all labels are -1. Of a set with a single split,
        the images of that.
        """
        return self._loader("predict", self.eval_transform())

    # Going on

    def state_dict(self) -> dict[str, Any]:
        """How many images the processes take at a time, and whether an epoch is under way."""
        return asdict(self._standing())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that batches mean the same images as before, in a run that goes on.

        Raises:
            ValueError: if the processes' batches together hold another number of images.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before, now = Standing(**state_dict), self._standing()
        if before.begun and before.images != now.images:
            raise DataError(
                f"the checkpoint counts batches of {before.images} images"
                f" ({before.processes} × {before.images // before.processes}), and here they hold"
                f" {now.images} ({now.processes} × {now.images // now.processes}): set"
                f" data.batch_size so that the processes together take {before.images}"
            )
        if before.within and self.hparams.streaming and before.processes != now.processes:
            rank_zero_warn(
                f"{before.processes} processes began this epoch of a stream and {now.processes} go"
                " on with it: until it ends some images come twice and others not at all"
            )

    def _standing(self) -> Standing:
        _, processes = self._rank_and_world_size()
        return Standing.of(self.trainer, self.hparams.batch_size, processes)

    def _loader(self, stage: str, transform: Transform) -> ImageLoader:
        rows = self._open(stage)
        labelled = stage != "predict"
        reader = RowReader(
            image_column=self.hparams.image_column,
            label_column=self.hparams.label_column if labelled else None,
            mode=image_mode(self.data_config),
            transform=transform,
            classes=self.num_classes if labelled else None,
        )
        make = self._map_loader if isinstance(rows, datasets.Dataset) else self._stream_loader
        return make(stage, rows, reader)

    def _map_loader(self, stage: str, rows: datasets.Dataset, reader: RowReader) -> ImageLoader:
        hp, training = self.hparams, stage == "train"
        corrupt = CorruptImages(hp.max_corrupt_images, len(rows), self._split_label(stage))
        images = ImageDataset(
            rows, reader, corrupt, replace=training, seed=self._seed if training else None
        )
        rank, world_size = self._rank_and_world_size()
        sampler: TrainingSampler | None = None
        if training and hp.repeated_augmentation:
            sampler = RepeatedAugmentation(
                images, hp.repeated_augmentation, rank, world_size, self._seed
            )
        elif training:
            sampler = TrainingSampler(images, rank, world_size, self._seed)
        return ImageLoader(
            images,
            sampler=sampler,
            # A last batch of few images would weigh as much as a full one; but a small set has no
            # other.
            drop_last=training and len(rows) >= hp.batch_size * world_size,
            **self._loader_options(training, hp.num_workers),
        )

    def _stream_loader(
        self, stage: str, rows: datasets.IterableDataset, reader: RowReader
    ) -> ImageLoader:
        hp, training = self.hparams, stage == "train"
        rank, world_size = self._rank_and_world_size()
        size = stream_size(rows, hp.train_split) if training else None
        limited = self.trainer is not None and isinstance(self.trainer.limit_train_batches, int)
        if training and size is None and world_size > 1 and not limited:
            raise DataError(
                "the description of this stream does not tell how many images it has, so the"
                " processes could not stop together: set trainer.limit_train_batches to the number"
                " of batches per epoch, or streaming=false"
            )
        rows = shard_stream(rows, rank, world_size)
        if training:
            rows = rows.shuffle(seed=self._seed, buffer_size=hp.shuffle_buffer)
        workers = min(hp.num_workers, rows.num_shards)
        images = ImageStream(
            rows,
            reader,
            CorruptImages(hp.max_corrupt_images, max(workers, 1), self._split_label(stage)),
            hp.batch_size,
            batches=None if size is None else batches_per_process(size, hp.batch_size, world_size),
            cycle=training and world_size > 1,
            seed=(self._seed, rank) if training else None,
        )
        return ImageLoader(images, **self._loader_options(training, workers))

    def _split_label(self, stage: str) -> str:
        """What messages call the images of a stage."""
        return self._split_name(stage) + (
            f" ({'kept' if stage == 'train' else 'held-out'} part)" if self._held_out(stage) else ""
        )

    @property
    def _seed(self) -> int:
        """Of the order and the augmentation of training images, the same in all processes."""
        return run_seed() + self.hparams.seed

    def _rank_and_world_size(self) -> tuple[int, int]:
        """This process's number and the number of processes."""
        return (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )

    def _loader_options(self, training: bool, workers: int) -> dict[str, Any]:
        """What all loaders have in common."""
        hp = self.hparams
        return {
            "batch_size": (
                hp.batch_size if training or hp.eval_batch_size is None else hp.eval_batch_size
            ),
            "num_workers": workers,
            "pin_memory": hp.pin_memory and torch.accelerator.is_available(),
            "persistent_workers": hp.persistent_workers and workers > 0,
            "collate_fn": collate,
        }
