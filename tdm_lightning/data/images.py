"""From the rows of a set to batches of tensors, leaving out what cannot be decoded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tdm_lightning.core.randomness import seeded
from tdm_lightning.data.sampling import batches_per_worker
from tdm_lightning.data.transforms import Transform
from tdm_lightning.errors import DataError, SettingTypeError

Sample = tuple[Tensor, int]
Labelled = tuple[Image.Image, int]

#: What PIL raises for files that are cut off, missing or no images.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_NO_LABEL = -1


def decode(value: Any, mode: str) -> Image.Image:
    """A PIL image from encoded bytes, a path, or a dict with ``bytes`` or ``path``, turned upright
    as its EXIF data says.

    Args:
        value: what the image column holds.
        mode: PIL's mode of the result.

    Raises:
        OSError, SyntaxError, ValueError, EOFError: if it cannot be decoded.
    """
    if value is None:
        raise DataError("there is no image")
    if isinstance(value, str):
        value = {"path": value}
    elif isinstance(value, bytes):
        value = {"bytes": value}
    return datasets.Image(mode=mode).decode_example({"bytes": None, "path": None, **value})


@dataclass(frozen=True)
class RowReader:
    """Makes an image tensor and a label of a row.

    Attributes:
        image_column: name of the column with images.
        label_column: name of the column with classes; ``None``: labels are -1.
        mode: PIL's mode of the images.
        transform: makes a tensor C×H×W of an image.
        classes: number of classes; labels must lie below.
    """

    image_column: str
    label_column: str | None
    mode: str
    transform: Transform
    classes: int | None

    def image(self, row: Mapping[str, Any]) -> Image.Image:
        """The decoded image; errors as :func:`decode`."""
        return decode(row[self.image_column], self.mode)

    def label(self, row: Mapping[str, Any]) -> int:
        """The class.

        Raises:
            ValueError: if it is none of the classes.
        """
        if self.label_column is None:
            return _NO_LABEL
        label = row[self.label_column]
        if label is None or label < 0 or (self.classes is not None and label >= self.classes):
            raise DataError(
                f"column {self.label_column!r} holds the label {label}, but labels must lie in"
                f" 0…{(self.classes or 1) - 1}; splits without labels can only be predicted;"
                " num_classes sets the number of classes"
            )
        return int(label)


class CorruptImages:
    """Reports images that cannot be decoded, and ends the run when there are too many; counts over
    all workers of a process.

    Args:
        limit: how many are tolerated.
        slots: number of counters; each is written by one worker at a time.
        split: what the split is called.
    """

    def __init__(self, limit: int, slots: int, split: str) -> None:
        self.limit = limit
        self.split = split
        self.counts = torch.zeros(slots, dtype=torch.int32).share_memory_()

    def report(self, slot: int, count: int, where: str, error: Exception) -> None:
        """Set a counter, and warn where that is news.

        Raises:
            ValueError: if there are more than the limit.
        """
        if self.counts[slot] == count:
            return
        self.counts[slot] = count
        total = int(self.counts.sum())
        message = f"image {where} of split {self.split!r} cannot be decoded ({error})"
        if total > self.limit:
            raise DataError(
                f"{message}; corrupt images so far: {total}, max_corrupt_images: {self.limit}; "
                "repair the data, or raise max_corrupt_images to skip more"
            ) from error
        warnings.warn(f"{message}: skipped; {total} of at most {self.limit} so far", stacklevel=3)


class SharedEpoch:
    """The number of the epoch under way, which workers that live longer than an epoch see too."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tell the workers which epoch begins."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """From 0."""
        return int(self._epoch)


class ImageDataset(SharedEpoch, Dataset[Sample | None]):
    """The images of a split that can be indexed. An index beyond the last is another copy: ``i`` is
    image ``i % length``.

    Args:
        rows: the split.
        reader: makes tensors of its rows.
        corrupt: hears of images that cannot be decoded; with one counter per row, so that each
            counts once in all epochs.
        replace: give the next image in the place of one that cannot be decoded, so that batches
            keep their size (training); otherwise give ``None``, so that every image counts once
            (evaluation).
        seed: of the transform, with the epoch and the index; ``None``: it draws from the random
            numbers of the process.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        reader: RowReader,
        corrupt: CorruptImages,
        replace: bool,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.reader = reader
        self.corrupt = corrupt
        self.replace = replace
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, index: int) -> str | None:
        """The path that the set has for an image, if any."""
        return _path(self.rows[index][self.reader.image_column])

    def __getitem__(self, index: int) -> Sample | None:
        if self.seed is None:
            return self._sample(index)
        with seeded(self.seed, self.epoch, index):
            return self._sample(index)

    def _sample(self, index: int) -> Sample | None:
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            row = self.rows[position]
            try:
                image = self.reader.image(row)
            except _UNREADABLE as error:
                where = f"{position}{_path_note(row[self.reader.image_column])}"
                self.corrupt.report(position, 1, where, error)
                if not self.replace:
                    return None
            else:
                return self.reader.transform(image), self.reader.label(row)
        raise DataError(
            f"none of the {len(self)} images of split {self.corrupt.split!r} can be decoded"
        )


class ImageStream(SharedEpoch, IterableDataset[Sample]):
    """The images of a split that can only be iterated.

    Args:
        stream: this process's shard of the split.
        reader: makes tensors of its rows.
        corrupt: hears of images that cannot be decoded; with one counter per worker, for one epoch.
        batch_size: images per batch.
        batches: batches that this process needs in an epoch: shorter streams start over; ``None``:
            as many as there are.
        cycle: without ``batches``, start over without end.
        seed: of the transform, with the epoch, the worker and the position in its stream;
            ``None``: it draws from the random numbers of the process.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        reader: RowReader,
        corrupt: CorruptImages,
        batch_size: int,
        batches: int | None = None,
        cycle: bool = False,
        seed: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.reader = reader
        self.corrupt = corrupt
        self.batch_size = batch_size
        self.batches = batches
        self.cycle = cycle
        self.seed = seed

    def __len__(self) -> int:
        if self.batches is None:
            raise SettingTypeError("a stream of unknown size has no length")
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream too, whose order follows from it."""
        super().set_epoch(epoch)
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.corrupt.counts[worker] = 0
        if self.batches is None:
            rows = self._cycled(worker) if self.cycle else self._once(worker)
        else:
            rows = islice(
                self._cycled(worker),
                batches_per_worker(self.batches, worker, workers) * self.batch_size,
            )
        for position, (image, label) in enumerate(rows):
            yield self._transformed(image, worker, position), label

    def _cycled(self, worker: int) -> Iterator[Labelled]:
        while True:
            empty = True
            for image in self._once(worker):
                empty = False
                yield image
            if empty:
                raise DataError(f"an epoch of split {self.corrupt.split!r} gave no image")

    def _once(self, worker: int) -> Iterator[Labelled]:
        for position, row in enumerate(self.stream):
            image = self._read(row, position, worker)
            if image is not None:
                yield image, self.reader.label(row)

    def _transformed(self, image: Image.Image, *position: int) -> Tensor:
        if self.seed is None:
            return self.reader.transform(image)
        with seeded(*self.seed, self.epoch, *position):
            return self.reader.transform(image)

    def _read(self, row: Mapping[str, Any], position: int, worker: int) -> Image.Image | None:
        try:
            return self.reader.image(row)
        except _UNREADABLE as error:
            where = (
                f"{position} of worker {worker}'s stream{_path_note(row[self.reader.image_column])}"
            )
            self.corrupt.report(worker, int(self.corrupt.counts[worker]) + 1, where, error)
            return None


def _path(value: Any) -> str | None:
    path = value.get("path") if isinstance(value, Mapping) else value
    return path if isinstance(path, str) else None


def _path_note(value: Any) -> str:
    path = _path(value)
    return f", {path}," if path else ""


def collate(samples: Sequence[Sample | None]) -> tuple[Tensor, Tensor] | None:
    """A batch of images B×C×H×W, float32, and labels B, int64, of those that could be read;
    ``None`` where there are none.

    >>> images, labels = collate([(torch.zeros(3, 8, 8), 4), None])
    >>> images.shape, labels
    (torch.Size([1, 3, 8, 8]), tensor([4]))
    """
    read = [sample for sample in samples if sample is not None]
    if not read:
        return None
    images, labels = zip(*read, strict=True)
    return torch.stack(images), torch.tensor(labels)
