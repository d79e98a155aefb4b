"""The tokens between two steps: few fields, none made up."""

import dataclasses

import pytest
import torch

import tdm_lightning as tdm

INFO = tdm.ModelInfo(
    depth=4, patches=6, width=8, heads=2, prefix=1, class_tokens=1, pooling="token"
)


def tokens(**changes):
    return tdm.Tokens(torch.randn(2, 7, 8), 1, INFO, **changes)


def test_there_are_at_most_ten_fields():
    assert len(dataclasses.fields(tdm.Tokens)) <= 10


def test_a_field_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match=r"no field carry; it has x, prefix, .* in state"):
        tokens().replace(x=torch.zeros(2, 3, 8), carry={})


def test_a_replaced_copy_leaves_the_original():
    before = tokens()
    after = before.replace(prefix=2)
    assert (before.prefix, after.prefix) == (1, 2)
    assert after.x is before.x
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.prefix = 3


@pytest.mark.parametrize("given", [True, False])
def test_sizes_are_the_mergers_or_the_sums_over_members(given):
    group = torch.tensor([[0, 0, 1, 2, 2, -1]]).expand(2, -1)
    size = torch.full((2, 3), 7.0) if given else None
    reduction = tdm.Reduction(torch.zeros(2, 3, 8), group, torch.zeros_like(group), size)
    after = tokens(size=torch.arange(1.0, 7.0).expand(2, -1)).reduced(0, reduction)
    assert after.size.tolist() == [[7.0] * 3 if given else [3.0, 3.0, 9.0]] * 2
