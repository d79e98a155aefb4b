"""Which images a process sees, and in which order."""

from __future__ import annotations

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler


class RepeatedAugmentation(RepeatAugSampler, DistributedSampler):
    """timm's repeated augmentation: several differently augmented copies of an image, spread over the processes.

    An epoch keeps its length, so it shows ``1/repeats`` of the images. In one process the copies of an image follow each other.
    A ``DistributedSampler`` by type, so Lightning tells it the epoch and leaves it in place.

    Args:
        dataset: the images.
        repeats: copies of each.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
    """

    def __init__(self, dataset: Dataset, repeats: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        RepeatAugSampler.__init__(self, dataset, num_replicas=world_size, rank=rank, num_repeats=repeats)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch."""
        self.epoch = self.seed + epoch


def stream_part(stream: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """The part of a stream that one process reads: whole shards if they divide evenly, else every ``world_size``-th image."""
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


def worker_share(batches: int, worker: int, workers: int) -> int:
    """Batches that one worker of a process makes, so that together they make ``batches``.

    >>> [worker_share(7, worker, 3) for worker in range(3)]
    [3, 2, 2]
    """
    return batches // workers + (worker < batches % workers)
