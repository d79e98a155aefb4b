"""The loader of a split, which can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tdm_lightning.data.images import SharedEpoch
from tdm_lightning.data.sampling import TrainingSampler
from tdm_lightning.errors import DataError

Batch: TypeAlias = list[Tensor] | None


@dataclass(frozen=True)
class Standing:
    """Where a run stands among its images.

    Attributes:
        images: in a batch of all processes together.
        processes: how many there are.
        begun: some batches are behind it.
        within: some of the epoch's are, and some are not.
    """

    images: int
    processes: int
    begun: bool
    within: bool

    @classmethod
    def of(cls, trainer: Trainer | None, batch_size: int, processes: int) -> Standing:
        """Of a Trainer; ``None``: at the start."""
        epoch, batches = (0, 0) if trainer is None else trainer_position(trainer)
        within = batches > 0 and trainer is not None and not trainer.is_last_batch
        return cls(batch_size * processes, processes, bool(epoch or batches), within)


class ImageLoader(DataLoader):
    """A ``DataLoader`` that leaves out batches without an image, gives tuples, numbers its epochs
    and can go on within one.

    Each epoch has an order and an augmentation of its own, which follow from the epoch's number
    alone. :meth:`state_dict` tells the epoch and how many of its batches were given out, whatever
    workers have prepared beyond them; after :meth:`load_state_dict` the next epoch goes on from
    there. In a Trainer, :meth:`follow` makes the Trainer's own count decide, which it restores with
    any of its checkpoints.

    Images that are indexed are picked up where they were left at once. A stream is read again up to
    there: with as many workers and processes as before it then gives the same images, at the price
    of loading those already seen.
    """

    # Set here, since Lightning makes loaders anew from the arguments of their constructor.
    _epoch = 0
    _batches = 0  # of the epoch, given out
    _begun = False
    _trainer: Trainer | None = None

    def follow(self, trainer: Trainer) -> None:
        """Be where a Trainer is, whenever it begins an epoch of this loader."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Number of the epoch and of its batches given out, the same in every process."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next epoch go on from what :meth:`state_dict` told."""
        self._epoch, self._batches = state["epoch"], state["batches"]
        self._begun = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        self._find_position()
        for batch in _named(self._remaining()):
            if batch is not None:
                self._batches += 1
                images, labels = batch  # pinning makes lists of tuples
                yield images, labels
        self._epoch, self._batches, self._begun = self._epoch + 1, 0, False

    def _find_position(self) -> None:
        """Set the epoch and how many of its batches are behind us; one left early is over."""
        trainer = self._trainer
        if trainer is not None and trainer.training and trainer.train_dataloader is self:
            self._epoch, self._batches = trainer_position(trainer)
        elif self._begun:
            self._epoch, self._batches = self._epoch + 1, 0
        self._begun = True

    def _remaining(self) -> Iterator[Batch]:
        """The epoch from its position on."""
        images, sampler = self.dataset, self.sampler
        if isinstance(images, SharedEpoch):
            images.set_epoch(self._epoch)
        if isinstance(sampler, TrainingSampler):
            sampler.set_epoch(self._epoch)
            sampler.start = self._batches * (self.batch_size or 1)
            return super().__iter__()
        return islice(super().__iter__(), self._batches, None)


def _named(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; what went wrong in a worker is told in one line.

    Raises:
        ValueError: if a worker died, or met data that it refused.
    """
    try:
        yield from batches
    except DataError as error:  # from a worker: with the worker's traceback in its message
        message = str(error).rpartition(f"{DataError.__name__}: ")[2].strip()
        raise DataError(message) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"a process that loads images died: {error}. Most often memory ran out: set fewer"
            " num_workers or a smaller batch_size; num_workers=0 shows an error of one's own code"
        ) from error


def trainer_position(trainer: Trainer) -> tuple[int, int]:
    """The epoch a Trainer is in and how many of its batches it has taken, right after a resume too.

    Not from the loader's own state: Lightning restores that only if nothing has asked for the
    loader before, as ``estimated_stepping_batches`` does, and it counts batches fetched ahead.
    """
    return trainer.current_epoch, trainer.fit_loop.batch_idx + 1
