"""Checkpoints that are there in whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the file and then renames, so that a full disk leaves the one before.

    Lightning writes into the system's temporary folder and moves from there, which copies over the
    last good file where that folder is on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """See ``TorchCheckpointIO``."""
        if "://" in os.fspath(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_whole(trainer: Trainer) -> None:
    """Let a Trainer write its checkpoints so, unless it has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
