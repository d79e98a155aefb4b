"""A stream over nodes and workers, its shards as unequal as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from datasets import IterableDataset, SplitDict, SplitInfo
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.data.sampling import batches_per_process
from tests.data.test_sampling import stream_loader

pytestmark = pytest.mark.slow

BATCH = 4


def rows(shards: list[range]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for number in shard:
            yield {"image": number}


def uneven(sizes: list[int]) -> IterableDataset:
    """Numbered images in shards of these sizes; the description tells how many there are."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    shards = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    stream = IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})
    stream.info.splits = SplitDict({"train": SplitInfo(name="train", num_examples=ends[-1])})
    return stream


def epochs(
    sizes: list[int], nodes: int, workers: int, training: bool
) -> Iterator[list[list[list[int]]]]:
    """The batches of every node, epoch by epoch."""
    loaders = [
        stream_loader(uneven(sizes), rank, nodes, training, num_workers=workers)
        for rank in range(nodes)
    ]
    for _ in range(3):
        yield [[labels.tolist() for _, labels in loader] for loader in loaders]


nodes, workers = st.integers(1, 4), st.sampled_from([0, 2, 3])


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=7), nodes=nodes, workers=workers)
def test_evaluation_sees_every_image_once(sizes: list[int], nodes: int, workers: int) -> None:
    for found in epochs(sizes, nodes, workers, training=False):
        seen = [image for node in found for batch in node for image in batch]
        assert sorted(seen) == list(range(sum(sizes)))


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=7), nodes=nodes, workers=workers)
def test_no_node_waits_for_another_in_training(sizes: list[int], nodes: int, workers: int) -> None:
    expected = batches_per_process(sum(sizes), BATCH, nodes)
    for found in epochs(sizes, nodes, workers, training=True):
        assert [len(node) for node in found] == [expected] * nodes
        assert {len(batch) for node in found for batch in node} == {BATCH}
        seen = [{image for batch in node for image in batch} for node in found]
        assert sum(map(len, seen)) == len(set().union(*seen)), "an image on two nodes"


@given(
    size=st.integers(1, 5), each=st.integers(1, 3), nodes=nodes, workers=st.sampled_from([0, 1, 2])
)
def test_equal_shards_are_trained_on_evenly(size: int, each: int, nodes: int, workers: int) -> None:
    size, shards = size * BATCH, nodes * max(workers, 1) * each
    for found in epochs([size] * shards, nodes, workers, training=True):
        seen = Counter(image for node in found for batch in node for image in batch)
        assert seen == Counter(range(size * shards))
