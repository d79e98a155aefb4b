"""Joining one side to the other against a list that shrinks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops.sides import join_sides


@given(
    n=st.integers(2, 30), first=st.integers(0, 1), share=st.floats(0, 1), seed=st.integers(0, 999)
)
def test_numbers(n, first, share, seed):
    torch.manual_seed(seed)
    sources, targets = range(first, n, 2), range(1 - first, n, 2)
    pairs = int(share * len(sources))
    chosen = torch.rand(2, len(sources)).argsort(dim=1)[:, :pairs]
    partner = torch.randint(len(targets), (2, len(sources)))
    found = join_sides(chosen, partner, n, first)
    for image in range(2):
        into = list(range(n))
        for at in chosen[image].tolist():
            into[sources[at]] = targets[partner[image, at]]
        left = [place for place in range(n) if into[place] == place]
        assert found[image].tolist() == [left.index(into[place]) for place in range(n)]
    step = torch.tensor([[0], [n - pairs]])
    assert torch.equal(join_sides(chosen, partner, n, first, left=n - pairs), found + step)
