"""What callbacks want to know of a loader's batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from tdm_lightning.errors import SettingError


def first_images(batch: Any) -> Tensor:
    """The images of a batch, B×C×H×W: its first floating-point tensor of four dimensions, in
    nested tuples, lists and mappings.

    Raises:
        ValueError: if there is none.
    """
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point():
            return leaf
    raise SettingError(
        f"found no images in a batch of type {type(batch).__name__}: expected a floating-point"
        " tensor B×C×H×W, alone or inside tuples, lists and dicts"
    )


def batch_size(batch: Any) -> int:
    """Number of images in a batch, for Lightning's ``ThroughputMonitor``; errors as
    :func:`first_images`.
    """
    return len(first_images(batch))


def is_sampled(index: int, total: float, most: int) -> bool:
    """Whether a batch is among ``most`` that are spread evenly over a loader.

    Args:
        index: the batch, from 0.
        total: batches in the loader; infinite where it does not tell its length: then the first
            ones are taken.
        most: how many to take.
    """
    if total <= most or total == float("inf"):
        return index < most
    return index * most % int(total) < most


def batches_in_loader(trainer: Trainer, dataloader_idx: int = 0) -> float:
    """Batches that a Trainer takes from the loader it is at; infinite where that is not known."""
    if trainer.training:
        return trainer.num_training_batches
    return (trainer.num_test_batches if trainer.testing else trainer.num_val_batches)[
        dataloader_idx
    ]


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _leaves(item)
    else:
        yield batch
