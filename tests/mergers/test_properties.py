"""What every merger of the library promises, whatever the shape, the type and the numbers."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdm_lightning as tdm
from tdm_lightning.core import Role, Seen

MERGERS = {
    "Cluster": lambda: tdm.Cluster(),
    "CriteriaMerger": lambda: tdm.CriteriaMerger(),
    "Drop": lambda: tdm.Drop(),
    "EnergyMerger": lambda: tdm.EnergyMerger(),
    "Fuse": lambda: tdm.Fuse(),
    "FusingMerger": lambda: tdm.FusingMerger(),
    "FusingMerger, dropping": lambda: tdm.FusingMerger(drop=True),
    "PairMerger": lambda: tdm.PairMerger(),
    "RankMerger": lambda: tdm.RankMerger(),
    "RankMerger, dropping": lambda: tdm.RankMerger(drop=1),
    "TokenMerger": lambda: tdm.TokenMerger(),
    "TokenMerger, other": lambda: tdm.TokenMerger(density="knn", matching="greedy"),
    "WardMerger": lambda: tdm.WardMerger(),
    "WardMerger, rounds": lambda: tdm.WardMerger(rounds=4, protect=0.1),
}
#: Their groups depend on where tokens stand in the sequence.
BY_PLACE = ("PairMerger", "FusingMerger", "CriteriaMerger", "WardMerger")
#: Their sizes are no sums: unlike tokens count less, or sizes play no part.
OWN_SIZES = ("RankMerger", "FusingMerger")


def test_all_of_them_are_here():
    own = {
        one.__name__
        for path, one in tdm.Merger.known().items()
        if path.startswith("tdm_lightning.") and not inspect.isabstract(one)
    }
    assert {name.partition(",")[0] for name in MERGERS} == own


@st.composite
def cases(draw, merger):
    """What there is to see, and how many are to be left."""
    n = draw(st.integers(6, 24))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    x, keys = drawn(2, n, draw(st.integers(2, 9))), drawn(2, n, 4)
    importance = torch.rand(2, n, generator=generator)
    kind = draw(st.sampled_from(["drawn", "equal", "zero", "unattended", "large"]))
    if kind in ("equal", "zero"):
        x, keys = x[:, :1].expand_as(x), keys[:, :1].expand_as(keys)
        x, keys = (x * 0, keys * 0) if kind == "zero" else (x, keys)
    elif kind == "unattended":
        importance = importance * 0
    elif kind == "large":
        x = x * 1000
    x, keys, size = x.to(dtype), keys.to(dtype), torch.randint(1, 9, (2, n), generator=generator)
    keep = draw(st.integers(n - n // 2, n - 2))
    merger.check(n, keep)
    return Seen(x, size.float(), importance, keys, x, prefix=1), keep


def part(seen, rows):
    names = ("x", "size", "importance", "keys", "normed")
    return Seen(**{name: getattr(seen, name)[rows] for name in names}, prefix=seen.prefix)


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=10)
@given(data=st.data())
def test_counts_and_the_fate_of_every_token(name, data):
    merger = MERGERS[name]()
    seen, keep = data.draw(cases(merger))
    found, leaving = merger(seen, keep), merger.leaving(keep)
    batch, n, width = seen.x.shape
    assert found.x.shape == (batch, leaving, width)
    assert found.x.dtype == seen.x.dtype
    assert found.x.isfinite().all()
    assert found.assignment.shape == found.role.shape == (batch, n)
    assert torch.equal(found.assignment < 0, found.role == Role.DROPPED)
    for image in range(batch):
        assert set(found.assignment[image].tolist()) - {-1} == set(range(leaving))
    if not name.startswith(OWN_SIZES):
        size = found.totals(seen.size) if found.size is None else found.size
        there = torch.where(found.assignment < 0, 0, seen.size)
        torch.testing.assert_close(size.float().sum(1), there.sum(1))
        torch.testing.assert_close(size.float(), found.totals(seen.size))
    elif found.size is not None:
        assert found.size.isfinite().all()
        assert (found.size > 0).all()


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=10)
@given(data=st.data())
def test_an_image_does_not_depend_on_its_batch(name, data):
    merger = MERGERS[name]()
    seen, keep = data.draw(cases(merger))
    if len(seen.x.flatten(0, 1).unique(dim=0)) < 2 * seen.x.shape[1]:
        return  # among equal tokens rounding decides, which is another where images stand together
    together, alone = merger(seen, keep), merger(part(seen, slice(1, 2)), keep)
    assert torch.equal(together.assignment[1], alone.assignment[0])
    torch.testing.assert_close(together.x[1], alone.x[0])


@pytest.mark.parametrize("name", [name for name in MERGERS if not name.startswith(BY_PLACE)])
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), n=st.integers(6, 24))
def test_commutes_with_a_permutation(name, seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 8, generator=generator)
    importance = torch.rand(2, n, generator=generator)
    seen = Seen(x, torch.ones(2, n), importance, x[..., :4], x, prefix=1)
    shuffle, merger = torch.randperm(n, generator=generator), MERGERS[name]()
    before = merger(seen, n - n // 3)
    after = merger(part(seen, (slice(None), shuffle)), n - n // 3)
    # Groups may be numbered in another order where that goes by the place.
    for image in range(2):
        pairs = set(
            zip(
                before.assignment[image, shuffle].tolist(),
                after.assignment[image].tolist(),
                strict=True,
            )
        )
        assert len(pairs) == len(set(before.assignment[image].tolist()))
        for old, new in pairs - {(-1, -1)}:
            torch.testing.assert_close(before.x[image, old], after.x[image, new])
    assert torch.equal(after.role, before.role[:, shuffle])


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=10)
@given(data=st.data())
def test_gradients_are_finite(name, data):
    merger = MERGERS[name]()
    seen, keep = data.draw(cases(merger))
    x, importance = seen.x.detach().clone().requires_grad_(), seen.importance.requires_grad_()
    found = merger(Seen(x, seen.size, importance, seen.keys, x, prefix=1), keep)
    found.x.float().mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.ne(0).any()
    assert importance.grad is None or importance.grad.isfinite().all()
