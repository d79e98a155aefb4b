"""Where callbacks leave their files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from tdm_lightning.visualize.sheet import make_folder


def check_folder(trainer: Trainer, folder: str | None) -> None:
    """Refuse a folder that cannot be written before the run, not after it.

    Raises:
        ValueError: if it cannot.
    """
    if folder is not None and trainer.is_global_zero:
        make_folder(folder)


def output_folder(trainer: Trainer, folder: str | None) -> Path | None:
    """The folder to write to, or ``None`` where this process writes nothing: not the first one, or
    a ``fast_dev_run``.

    To be called on all processes.

    Args:
        trainer: the run.
        folder: the user's choice; ``None``: the logger's, or the trainer's root.
    """
    chosen = folder or trainer.log_dir or trainer.default_root_dir
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return make_folder(chosen)
