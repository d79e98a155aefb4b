"""ToFu: against OpenToMe's code, and with plain loops."""

import pytest
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Role, Seen
from tdm_lightning.mergers import FusingMerger
from tdm_lightning.ops import match_alternating
from tests.helpers.peers import first_of_group

CASES = ("tofu_a", "tofu_b", "tofu_c")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_official_numbers(official, golden, case):
    r = golden(case)[0]["method"]["r"]
    _, tensors, model = official(case, tdm.ToFu(r))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    for layer in output.trace.layers:
        held = layer.assignment >= 0  # the record says where dropped ones would have gone
        expected = tensors[f"source.{layer.index}"].long()
        assert torch.equal(
            first_of_group(layer.assignment), first_of_group(expected.masked_fill(~held, -1))
        )
        assert held.sum() < held.numel()


@torch.no_grad()
def test_norms_matter_in_the_official_case(official):
    _, tensors, model = official("tofu_a", tdm.ToFu(4))
    model.strategy.merger_in = lambda index, info: FusingMerger(drop=True)
    assert (model(tensors["input"]) - tensors["logits"]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("drop", [False, True])
def test_fusing_against_plain_loops(prefix, drop):
    x, keys = torch.randn(2, 9, 4), torch.randn(2, 9, 3)
    found = FusingMerger(drop)(Seen(x, keys=keys, prefix=prefix), 6)
    group = match_alternating(keys, 3, prefix)
    for image in range(2):
        for number in range(6):
            members = [i for i in range(9) if group[image, i] == number]
            odd = [i for i in members if (i + prefix) % 2 == 1]
            host = odd[0] if len(members) > 1 else members[0]
            if drop:
                expected = x[image, host]
            else:
                mean = torch.stack([x[image, i] for i in members]).mean(0)
                largest = max(x[image, i].norm() for i in members)
                expected = mean / x[image, host].norm() * largest
            torch.testing.assert_close(found.x[image, number], expected)
            for i in members:
                gone = drop and i != host
                assert found.assignment[image, i] == (-1 if gone else number)
                assert (found.role[image, i] == Role.DROPPED) == gone
