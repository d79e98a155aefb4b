"""Weights, weighted combination, gathering and spreading out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops import gather_tokens, unmerge


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(1, 9))
def test_gather_picks_by_position(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    x, index = (
        torch.randn(3, n, 2, generator=generator),
        torch.randint(n, (3, m), generator=generator),
    )
    found = gather_tokens(x, index)
    for image in range(3):
        for place in range(m):
            assert torch.equal(found[image, place], x[image, index[image, place]])


def test_unmerge_spreads_and_leaves_dropped_patches_empty():
    x = torch.tensor([[[1.0], [2.0]]])
    assert unmerge(x, torch.tensor([[1, -1, 0, 1]])).flatten().tolist() == [2, 0, 1, 2]
