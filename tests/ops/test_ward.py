"""Ward's linkage against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.errors import SettingError
from tdm_lightning.ops import fewest_after, joined, ward_leaders
from tdm_lightning.ops.rounds import pairs_per_round


def looped(features, weight, keep, rounds):
    """One image, with no matrix and no batch: lists of members, means computed anew each round."""
    groups = [[place] for place in range(len(features))]
    for number, pairs in enumerate(pairs_per_round(len(features), keep, rounds)):
        total = [sum(weight[i] for i in group) for group in groups]
        mean = [
            sum(weight[i] * features[i] for i in group) / whole
            for group, whole in zip(groups, total, strict=True)
        ]
        first = 1 - number % 2
        proposals = []
        for source in range(first, len(groups), 2):
            costs = [
                (
                    float(
                        total[source]
                        * total[target]
                        / (total[source] + total[target])
                        * ((mean[source] - mean[target]) ** 2).sum()
                    ),
                    target,
                )
                for target in range(1 - first, len(groups), 2)
            ]
            cost, target = min(costs)
            proposals.append((cost, source, target))
        accepted = sorted(proposals)[:pairs]
        for _, source, target in accepted:
            groups[target] = groups[target] + groups[source]
        gone = {source for _, source, _ in accepted}
        groups = [group for place, group in enumerate(groups) if place not in gone]
    return groups


def as_sets(group, keep):
    return [sorted((group == g).nonzero().flatten().tolist()) for g in range(keep)]


@given(
    n=st.integers(2, 24),
    share=st.floats(0, 1),
    rounds=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_the_rounds(n, share, rounds, seed):
    torch.manual_seed(seed)
    least = fewest_after(n, rounds)
    keep = least + int(share * (n - least))
    features, weight = torch.randn(2, n, 5).double(), torch.randint(1, 9, (2, n)).double()
    place = ward_leaders(features.float(), weight.float(), keep, rounds)
    group = joined(place)
    for image in range(2):
        expected = looped(features[image], weight[image], keep, rounds)
        assert as_sets(group[image], keep) == [sorted(members) for members in expected]
        assert place[image].unique().tolist() == [members[0] for members in expected]


@given(n=st.integers(2, 14), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_the_exact_agglomeration(n, share, seed):
    torch.manual_seed(seed)
    keep = max(1, int(share * n))
    features, weight = torch.randn(2, n, 3).double(), torch.randint(1, 9, (2, n)).double()
    place = ward_leaders(features.float(), weight.float(), keep, None)
    group = joined(place)
    for image in range(2):
        groups = [[i] for i in range(n)]
        while len(groups) > keep:
            best = None
            for a in range(len(groups)):
                for b in range(a + 1, len(groups)):
                    (ma, wa), (mb, wb) = (
                        (
                            (weight[image][g, None] * features[image][g]).sum(0)
                            / weight[image][g].sum(),
                            weight[image][g].sum(),
                        )
                        for g in (groups[a], groups[b])
                    )
                    cost = float(wa * wb / (wa + wb) * ((ma - mb) ** 2).sum())
                    best = min(best or (cost, a, b), (cost, a, b))
            _, a, b = best
            groups[a] = groups[a] + groups.pop(b)
        assert as_sets(group[image], keep) == [sorted(g) for g in groups]
        assert place[image].unique().tolist() == sorted(min(g) for g in groups)


@pytest.mark.parametrize("rounds", [1, 2, 3, None])
def test_equal_tokens_and_ties_go_to_the_lowest_place(rounds):
    place = ward_leaders(torch.ones(2, 8, 4), torch.ones(2, 8), 5, rounds)
    group = joined(place)
    assert torch.equal(group[0], group[1])
    assert len(place[0].unique()) == 5
    if rounds == 1:  # places 1, 3, 5 go into place 0
        assert group[0].tolist() == [0, 0, 1, 0, 2, 0, 3, 4]


@given(n=st.integers(1, 300), rounds=st.integers(1, 6), share=st.floats(0, 1))
def test_pairs_of_a_round(n, rounds, share):
    least = fewest_after(n, rounds)
    keep = least + int(share * (n - least))
    left = n
    for pairs in pairs_per_round(n, keep, rounds):
        assert 0 <= pairs <= left // 2
        left -= pairs
    assert left == keep
    if least > 1:
        with pytest.raises(SettingError, match=f"make at least {least} of {n} tokens"):
            pairs_per_round(n, least - 1, rounds)


def test_half_precision_is_compared_in_full():
    torch.manual_seed(0)
    features = torch.randn(1, 16, 8).half()
    expected = ward_leaders(features.float(), torch.ones(1, 16), 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ward_leaders(features, torch.ones(1, 16).half(), 6), expected)
