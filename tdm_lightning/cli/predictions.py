"""Predictions as a table, written while they are made."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionTable(BasePredictionWriter):
    """Writes ``predictions.csv``: a row for each image, in the order of the data.

    Several processes write a file each, ``predictions_RANK.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._file: TextIO | None = None
        self._rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the table."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._file = (folder / f"predictions{rank}.csv").open("w", newline="", encoding="utf-8")
        csv.writer(self._file).writerow(["image", "label", "name", "probability"])
        self._rows = 0

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
            writer.writerow([self._rows, label, name, f"{probability:.6f}"])
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
