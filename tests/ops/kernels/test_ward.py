"""Ward's linkage in Triton against torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.errors import SettingError
from tdm_lightning.ops import joined, kernels
from tdm_lightning.ops import ward_leaders as torch_form
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.kernels.limits import too_many
from tests.helpers.plans import COUNTS, TYPES, check_operator, is_grouping, patches

pytest.importorskip("triton")
from tdm_lightning.ops.kernels.ward import ward_leaders

# NumPy, in the interpreter, warns of numbers that are none and of what is masked.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def in_torch(tokens, keys, weight, keep, rounds):
    parts = [tokens] if keys is None else [tokens, keys]
    features = torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)
    return torch_form(features, weight, keep, rounds)


def given(batch, n, dtype=torch.float32):
    weight = torch.randint(1, 9, (batch, n)).to(dtype)
    return patches(batch, n, 24, dtype), patches(batch, n, 7, dtype), weight


@pytest.mark.parametrize(
    ("dtype", "rounds", "counts"),
    [
        (torch.float32, 1, COUNTS),
        (torch.float32, 2, COUNTS),
        (torch.float32, 5, (16, 65, 300)),
        (torch.float16, 3, (7, 65, 257)),
        (torch.bfloat16, 3, (7, 65, 257)),
    ],
)
def test_rounds(dtype, rounds, counts):
    for n in counts:
        cases = ((1, 0.8, True), (3, 0.8, False), (1, 0.0, True))
        for batch, share, with_keys in cases if n < 100 else cases[:2]:
            tokens, keys, weight = given(batch, n, dtype)
            keep = max(int(share * n), -(-n // 2**rounds))  # at most halved by each
            other = keys if with_keys else None
            found = ward_leaders(tokens, other, weight, keep, rounds)
            assert torch.equal(found, in_torch(tokens, other, weight, keep, rounds)), (n, keep)


@pytest.mark.parametrize(
    ("dtype", "counts"), [(torch.float32, COUNTS), *((half, (7, 65)) for half in TYPES[1:])]
)
def test_exact_agglomeration(dtype, counts):
    for n in counts:
        tokens, keys, weight = given(1 + 2 * (n < 100), n, dtype)
        for keep, other in ((max(n - 12, 1), keys), (min(n, 295), None)):
            found = ward_leaders(tokens, other, weight, keep, None)
            assert torch.equal(found, in_torch(tokens, other, weight, keep, None)), (n, keep)


@pytest.mark.parametrize(("keep", "rounds"), [(958, 1), (1366, None)])
def test_the_most_tokens(keep, rounds):
    tokens, keys, weight = given(1, 1369)
    found = ward_leaders(tokens, keys, weight, keep, rounds)
    assert torch.equal(found, in_torch(tokens, keys, weight, keep, rounds))


@pytest.mark.parametrize("rounds", [1, 2, 3, None])
def test_equal_tokens_and_ties_go_to_the_lowest_place(rounds):
    tokens, weight = torch.ones(2, 8, 4), torch.ones(2, 8)
    found = ward_leaders(tokens, None, weight, 5, rounds)
    assert torch.equal(found, in_torch(tokens, None, weight, 5, rounds))
    if rounds == 1:  # places 1, 3, 5 go into place 0
        assert found[0].tolist() == [0, 0, 2, 0, 4, 0, 6, 7]


@pytest.mark.parametrize("rounds", [3, None])
def test_many_in_one_target(rounds):
    """Two kinds of token, so that nearly all costs are ties, in more than one product's worth."""
    kinds = torch.eye(2)[torch.randint(0, 2, (2, 90))]
    weight = torch.randint(1, 9, (2, 90)).float()
    group = joined(ward_leaders(kinds, None, weight, 40, rounds))
    assert is_grouping(group, 40)
    for image, of in zip(group, kinds, strict=True):
        for number in range(40):
            assert len(of[image == number].unique(dim=0)) == 1
    assert torch.equal(group, joined(ward_leaders(kinds, None, weight, 40, rounds)))


@pytest.mark.parametrize("rounds", [3, None])
def test_numbers_that_are_none_still_give_groups(rounds):
    tokens = torch.randn(2, 40, 8)
    tokens[0, 3], tokens[0, 17, 2], tokens[1] = torch.nan, torch.inf, 0
    assert is_grouping(joined(ward_leaders(tokens, None, torch.ones(2, 40), 20, rounds)), 20)


def test_too_few_rounds_are_named():
    with pytest.raises(SettingError, match="1 rounds that each at most halve make at least 4 of 8"):
        ward_leaders(torch.randn(1, 8, 4), None, torch.ones(1, 8), 3, 1)


@in_two_forms(
    "tdm_lightning.ops.kernels.ward:ward_leaders",
    lambda tokens, *others: too_many(tokens.shape[1]),
)
def tried_ward(
    tokens: Tensor, keys: Tensor | None, weight: Tensor, keep: int, rounds: int | None
) -> Tensor:
    return in_torch(tokens, keys, weight, keep, rounds)


@pytest.mark.parametrize("rounds", [2, None])
def test_it_is_an_operator(rounds):
    tokens, keys, weight = given(2, 12)
    check_operator(tried_ward, tokens, keys, weight, 6, rounds)
    check_operator(tried_ward, tokens, None, weight, 6, rounds)
    assert tried_ward.refuses(torch.empty(1, 1370, 1)) == too_many(1370)


def test_a_mistake_does_not_turn_the_kernel_off():
    tokens, keys, weight = given(1, 8)
    with kernels.use("triton"):
        with pytest.raises(SettingError, match="at least 4 of 8"):
            tried_ward(tokens, keys, weight, 3, 1)
        assert not tried_ward.failed(tokens)
