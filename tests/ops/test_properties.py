"""What every operation promises, whatever the shape, the type and the numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def halves(n):
    """The fewest that pairs of two sets leave."""
    return n - n // 2


def one(n):
    return 1


#: N tokens to so many groups, and how few there may be.
GROUPINGS = {
    "bipartite": (lambda x, a, keep: ops.match_pairs(x, x.shape[1] - keep), halves),
    "greedy": (lambda x, a, keep: ops.match_pairs(x, x.shape[1] - keep, "greedy"), halves),
    "alternating": (lambda x, a, keep: ops.match_alternating(x, x.shape[1] - keep), halves),
    "energy": (
        lambda x, a, keep: ops.match_by_energy(x, x.shape[1] - keep, 0.5, x.shape[1]),
        halves,
    ),
    "both ways": (
        lambda x, a, keep: ops.match_both_ways(x, a, torch.ones_like(a), x.shape[1] - keep),
        halves,
    ),
    "gaussian": (lambda x, a, keep: ops.cluster_density_peaks(x, keep)[0], one),
    "knn": (lambda x, a, keep: ops.cluster_density_peaks(x, keep, "knn")[0], one),
    "decoupled": (
        lambda x, a, keep: ops.decouple(x, a, keep, min(1, keep // 2), min(1, keep // 2)),
        lambda n: 2,
    ),
    "ward": (
        lambda x, a, keep: ops.ward_groups(x, torch.ones_like(a), keep, 2),
        lambda n: ops.fewest_after(n, 2),
    ),
    "ward, exact": (lambda x, a, keep: ops.ward_groups(x, torch.ones_like(a), keep, None), one),
}


@st.composite
def cases(draw, fewest):
    """Tokens B×N×C, importances B×N and how many are to be left: drawn, all alike, or in twins."""
    n, width = draw(st.integers(4, 18)), draw(st.integers(2, 9))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(2, n, width, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    kind = draw(st.sampled_from(["drawn", "equal", "zero", "twins"]))
    if kind == "equal":
        x = x[:, :1].expand(2, n, width).clone()
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "twins":
        x[:, 1::2] = x[:, : 2 * (n // 2) : 2]
    importance = torch.rand(2, n, generator=generator) + 1e-3
    return x.to(dtype), importance, draw(st.integers(fewest(n), n - 1))


@pytest.mark.parametrize("name", GROUPINGS)
@given(data=st.data())
def test_tokens_are_partitioned(name, data):
    group_by, fewest = GROUPINGS[name]
    x, importance, keep = data.draw(cases(fewest))
    group = group_by(x, importance, keep)
    assert group.dtype == torch.int64
    assert group.shape == x.shape[:2]
    for image in range(2):
        assert set(group[image].tolist()) == set(range(keep)), "no group is empty"
    if len(x.flatten(0, 1).unique(dim=0)) < 2 * x.shape[1]:
        return  # among equal tokens rounding decides, which is another where images stand together
    for image in range(2):
        alone = group_by(x[image : image + 1], importance[image : image + 1], keep)
        assert torch.equal(alone[0], group[image]), "of no other image"


@given(data=st.data(), dropped=st.integers(0, 3), weighted=st.booleans())
def test_combined_tokens_lie_among_their_members(data, dropped, weighted):
    x, weight, keep = data.draw(cases(one))
    group = torch.arange(x.shape[1]).expand(2, -1) % keep
    group = torch.where(torch.arange(x.shape[1]) < dropped, -1, group)
    size = torch.randint(1, 5, group.shape, generator=torch.Generator().manual_seed(keep)).float()
    x = x.requires_grad_()
    merged, total = ops.combine(x, group, weight if weighted else None, size, keep)
    assert merged.dtype == x.dtype
    assert total.sum(1).tolist() == torch.where(group < 0, 0, size).sum(1).tolist()
    for image in range(2):
        for one_group in range(keep):
            members = x[image, group[image] == one_group].float()
            found = merged[image, one_group].float()
            if not len(members):
                assert found.eq(0).all()
                continue
            slack = 1e-2 * members.abs().max() + 1e-6  # what half precision rounds
            assert (found >= members.amin(0) - slack).all()
            assert (found <= members.amax(0) + slack).all()
    merged.float().sum().backward()
    assert x.grad.isfinite().all()


@given(data=st.data())
def test_distances(data):
    x, _, _ = data.draw(cases(one))
    d = ops.pairwise_distances(x)
    assert d.dtype == torch.float32
    assert (d >= 0).all()
    assert d.diagonal(dim1=1, dim2=2).eq(0).all()
    torch.testing.assert_close(d, d.transpose(1, 2))
    direct = (x.float().unsqueeze(1) - x.float().unsqueeze(2)).square().mean(-1).sqrt()
    torch.testing.assert_close(d, direct, rtol=1e-2, atol=2e-3 * (1 + float(x.abs().max())))


@given(data=st.data())
def test_pairs_are_mutual(data):
    x, score, _ = data.draw(cases(one))
    valid = score > 0.3
    other = ops.mutual_neighbours(x, valid)
    here = torch.arange(x.shape[1]).expand(2, -1)
    assert torch.equal(other.gather(1, other), here)
    assert torch.equal(other[~valid], here[~valid])


@given(data=st.data())
def test_orders_and_their_inverses(data):
    x, importance, keep = data.draw(cases(one))
    order = ops.rank_order(importance.to(x.dtype))
    assert torch.equal(ops.inverse_order(ops.inverse_order(order)), order)
    assert torch.equal(ops.gather_tokens(ops.gather_tokens(x, order), ops.inverse_order(order)), x)
    index, valid = ops.pack(importance > importance.median())
    assert torch.equal(valid.sum(1), (importance > importance.median()).sum(1))
    assert all(len(set(row.tolist())) == len(row) for row in index)
    dense = ops.unmerge(x[:, :keep], torch.where(order < keep, order, -1))
    assert torch.equal(
        dense.ne(0).any(-1) | (order >= keep), x.ne(0).any(-1).gather(1, order) | (order >= keep)
    )


@given(data=st.data(), heads=st.integers(1, 3), rows=st.integers(1, 2))
def test_attention_sums_to_one(data, heads, rows):
    x, policy, _ = data.draw(cases(one))
    q = x.unsqueeze(1).expand(-1, heads, -1, -1)
    weights = ops.class_attention(q, q, 0.1, rows)
    assert weights.shape == (2, heads, rows, x.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, rows))
    received = ops.received_attention(q, q, 0.1)
    torch.testing.assert_close(received.sum(-1), torch.ones(2))
    logits = (q.float() @ q.float().transpose(2, 3) * 0.1).clamp(-50, 50)
    allowed = ops.policy_softmax(logits, (policy > 0.5).float())
    assert allowed.isfinite().all()
    torch.testing.assert_close(allowed.sum(-1), torch.ones(allowed.shape[:3]), atol=1e-3, rtol=0)


@given(data=st.data(), threshold=st.floats(-1, 1))
def test_spread_weights_share_out_a_source_or_nothing(data, threshold):
    x, _, keep = data.draw(cases(one))
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    weights = ops.spread_weights(unit[:, :keep] @ unit.transpose(1, 2), threshold)
    assert (weights >= 0).all()
    total = weights.sum(1)
    assert torch.all(((total - 1).abs() < 1e-4) | (total == 0))


@given(n=st.integers(2, 300), rounds=st.integers(1, 8))
def test_rounds_leave_ever_fewer(n, rounds):
    assert 1 <= ops.fewest_after(n, rounds + 1) <= ops.fewest_after(n, rounds) < n
