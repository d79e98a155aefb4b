"""Predictions as a table, written while they are made."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from tdm_lightning.data.images import ImageDataset


class PredictionTable(BasePredictionWriter):
    """Writes ``predictions.csv``: a row for each image, in the order of the data, with its number
    and its file where the set has one, seen from the set's folder.

    Several processes write a file each, ``predictions_RANK.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._file: TextIO | None = None
        self._rows = 0
        self._images: Iterator[tuple[int, str]] = iter(())

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the table."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._file = (folder / f"predictions{rank}.csv").open("w", newline="", encoding="utf-8")
        csv.writer(self._file).writerow(["image", "file", "label", "name", "probability"])
        self._rows = 0
        self._images = _images(trainer)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add a batch."""
        assert self._file is not None
        best = prediction["probabilities"].max(dim=-1).values.tolist()
        labels = prediction["label"].tolist()
        writer = csv.writer(self._file)
        for label, name, probability in zip(labels, prediction["name"], best, strict=True):
            writer.writerow([*next(self._images), label, name, f"{probability:.6f}"])
            self._rows += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the table is."""
        assert self._file is not None
        self._file.close()
        print(f"wrote {self._rows} predictions to {self._file.name}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what was written."""
        if self._file is not None:
            self._file.close()


def _images(trainer: Trainer) -> Iterator[tuple[int, str]]:
    """Numbers and files of the images that this process predicts, but for those that are skipped:
    Lightning deals them out in turn. Streams tell no files, and are numbered as they come.
    """
    loader: Any = trainer.predict_dataloaders
    images = getattr(loader, "dataset", None)
    if not isinstance(images, ImageDataset):
        return ((number, "") for number in count())
    data: Any = getattr(trainer, "datamodule", None)
    place = getattr(data, "hparams", {}).get("dataset")
    folder = os.path.abspath(os.path.expanduser(place)) if isinstance(place, str) else None
    mine = range(trainer.global_rank, len(images), trainer.world_size)
    return (
        (number, _seen_from(folder, images.file(number) or ""))
        for number in mine
        if not images.corrupt.counts[number]
    )


def _seen_from(folder: str | None, file: str) -> str:
    inside = folder is not None and file.startswith(folder + os.sep)
    return os.path.relpath(file, folder) if inside else file
