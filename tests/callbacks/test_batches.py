"""Finding images in batches, and spreading samples over a loader."""

from collections import namedtuple
from itertools import pairwise

import pytest
import torch
from tdm_lightning.callbacks.batches import first_images, is_sampled

IMAGES = torch.zeros(2, 3, 8, 8)
LABELS = torch.arange(2)
Named = namedtuple("Named", "label image")


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (LABELS, IMAGES),
        [IMAGES, torch.ones(2, 3, 8, 8)],
        {"label": LABELS, "image": IMAGES},
        ({"meta": ["a", "b"], "views": (IMAGES, IMAGES + 1)}, LABELS),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3), IMAGES),
        Named(LABELS, IMAGES),
    ],
)
def test_first_images(batch):
    assert first_images(batch) is (batch[0] if isinstance(batch, list) else IMAGES)


def test_no_images():
    with pytest.raises(ValueError, match="no images in a batch of type dict"):
        first_images({"label": LABELS, "name": "cat"})


@pytest.mark.parametrize(("total", "most"), [(10, 3), (7, 7), (100, 8), (3, 8), (1, 1), (313, 8)])
def test_samples_are_as_many_as_asked_for_and_spread(total, most):
    chosen = [index for index in range(total) if is_sampled(index, total, most)]
    assert len(chosen) == min(total, most)
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert chosen[0] == 0


def test_a_loader_without_length_gives_its_first_batches():
    assert [is_sampled(index, float("inf"), 2) for index in range(4)] == [True, True, False, False]
