"""Which images a process sees, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler


class TrainingSampler(DistributedSampler):
    """A shuffled split, spread over the processes; each epoch has its own order, and can begin
    anywhere in it.

    A ``DistributedSampler`` by type in one process too, so Lightning tells it the epoch and leaves
    it in place.

    Args:
        dataset: the images.
        rank: this process.
        world_size: number of processes.
        seed: of the order.

    Attributes:
        start: how many of this process's images the next epoch leaves out, those that were already
            seen.
    """

    def __init__(self, dataset: Dataset, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        DistributedSampler.__init__(self, dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(self.indices(), self.start, None)

    def indices(self) -> Iterator[int]:
        """Of the whole epoch."""
        return super().__iter__()


class RepeatedAugmentation(RepeatAugSampler, TrainingSampler):
    """timm's repeated augmentation: several differently augmented copies of an image, spread over
    the processes.

    An epoch keeps its length, so it shows ``1/repeats`` of the images. In one process the copies of
    an image follow each other. Copy ``c`` of image ``i`` is the index ``i + c * len(dataset)``.

    Args:
        dataset: the images.
        repeats: copies of each.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
    """

    def __init__(
        self, dataset: Dataset, repeats: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        RepeatAugSampler.__init__(
            self, dataset, num_replicas=world_size, rank=rank, num_repeats=repeats
        )
        self.seed = seed
        self.start = 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch."""
        self.epoch = self.seed + epoch

    def __iter__(self) -> Iterator[int]:
        return TrainingSampler.__iter__(self)

    def indices(self) -> Iterator[int]:
        """Of the whole epoch."""
        for position, image in enumerate(RepeatAugSampler.__iter__(self)):
            copy = (self.rank + position * self.num_replicas) % self.num_repeats
            yield image + copy * len(self.dataset)


def shard_stream(stream: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """The shard of a stream that one process reads: whole shards if they divide evenly, else every
    ``world_size``-th image.
    """
    return split_dataset_by_node(stream, rank, world_size) if world_size > 1 else stream


def stream_size(stream: IterableDataset, split: str) -> int | None:
    """Number of images in a split, where the set's description tells."""
    known = (stream.info.splits or {}).get(split)
    return known.num_examples or None if known is not None else None


def batches_per_process(images: int, batch_size: int, world_size: int) -> int:
    """Batches that every process gets from a stream, the same for all; at least one.

    >>> batches_per_process(100, batch_size=8, world_size=2)
    6
    """
    return max(images // (batch_size * world_size), 1)


def batches_per_worker(batches: int, worker: int, workers: int) -> int:
    """Batches that one worker of a process makes, so that together they make ``batches``.

    >>> [batches_per_worker(7, worker, 3) for worker in range(3)]
    [3, 2, 2]
    """
    return batches // workers + (worker < batches % workers)
