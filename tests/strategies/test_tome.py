"""ToMe: against the official code, its schedules, its arithmetic and its limits."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tdm_lightning.ops import match_alternating


@pytest.mark.usefixtures("form")
@torch.no_grad()
def test_official_numbers(official):
    facts, tensors, model = official("tome_a", tdm.ToMe(8))
    output = model.run(tensors["input"], trace=True)
    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, tensors["features"], atol=2e-4, rtol=0)
    assert [count + 1 for count in output.trace.token_counts] == tensors["token_counts"].tolist()
    assert torch.equal(output.size, tensors["size.11"][:, 1:])
    assert [layer.index for layer in output.trace.layers] == facts["method"]["reduction_layers"]
    for layer in output.trace.layers:
        assert torch.equal(layer.assignment, tensors["groups"][layer.index][:, 1:] - 1)


@torch.no_grad()
def test_proportional_attention_changes_the_official_case(official):
    _, tensors, model = official("tome_a", tdm.ToMe(8, proportional_attention=False))
    assert (model(tensors["input"]) - tensors["logits"]).abs().amax(1).min() > 1e-2


def test_official_schedules(golden):
    facts, _ = golden("tome_a")
    for depth, r, kind, expected in facts["r_schedules"]["values"]:
        assert tdm.ToMe(tuple(r) if kind == "pair" else r).schedule.fewer(depth) == expected
        strategy = tdm.ToMe.from_config(tdm.ToMe(r).config())  # plain values know no tuples
        assert strategy.schedule.fewer(depth) == expected


def test_a_list_of_two_integers_is_no_pair():
    assert tdm.ToMe([8, 1]).schedule.fewer(4) == [8, 1, 0, 0]
    assert tdm.ToMe((8, 1)).schedule.fewer(3) == tdm.ToMe([8, 1.0]).schedule.fewer(3) == [0, 8, 16]


def plain_matching(features, pairs, prefix):
    """The same with loops: the group of every patch."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    even = [i for i in range(prefix, len(unit)) if i % 2 == 0]
    odd = [i for i in range(prefix, len(unit)) if i % 2 == 1]
    best = {i: max(odd, key=lambda j: unit[i] @ unit[j]) for i in even}
    gone = sorted(even, key=lambda i: -(unit[i] @ unit[best[i]]))[:pairs]
    slots = [i for i in even if i not in gone] + odd
    return [slots.index(best[i] if i in gone else i) for i in range(prefix, len(unit))]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [2, 7, 16])
def test_matching_against_plain_loops(n, prefix):
    features = torch.randn(3, prefix + n, 6)
    for pairs in range(n // 2 + 1):
        group = match_alternating(features[:, prefix:], pairs, prefix)
        for image in range(3):
            expected = plain_matching(features[image].double().numpy(), pairs, prefix)
            assert group[image].tolist() == expected


@torch.no_grad()
def test_merged_tokens_are_means_of_their_patches():
    """Without attention and MLP, merging block after block must give the mean over all patches that
    a token holds.
    """
    vit = timm.create_model("test_vit", img_size=64).eval()
    for block in vit.blocks:
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
        block.attn.proj.bias.zero_()
        block.mlp.fc2.bias.zero_()
    vit.norm = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    patches = vit.forward_features(images)[:, 1:]
    output = tdm.attach(vit, tdm.ToMe(2)).run(images, trace=True)
    held = F.one_hot(output.trace.layers[-1].assignment, output.features.shape[1] - 1).float()
    mean = held.transpose(1, 2) @ patches / held.sum(1).unsqueeze(-1)
    torch.testing.assert_close(output.features[:, 1:], mean, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.size, held.sum(1))


@torch.no_grad()
def test_r_beyond_half_merges_half():
    vit = timm.create_model("test_vit", img_size=64).eval()  # 16 patches
    images = torch.randn(2, 3, 64, 64)
    logits, trace = tdm.attach(vit, tdm.ToMe(1000)).trace(images)
    assert trace.token_counts == [8, 4, 2, 1, 1, 1]
    assert logits.isfinite().all()
    assert trace.layers[-1].assignment.eq(0).all()
    assert trace.layers[-1].role.unique().tolist() in ([Role.MATCHED], [Role.KEPT, Role.MATCHED])


@torch.no_grad()
def test_nothing_to_merge_is_the_plain_model():
    vit = timm.create_model("test_vit", img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    for r in (0, [0], (0, 0.5)):
        torch.testing.assert_close(tdm.attach(vit, tdm.ToMe(r))(images), vit(images))


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit4"])
def test_other_prefixes_and_pools(name):
    vit = timm.create_model(name, img_size=64, num_classes=7).eval()
    model = tdm.attach(vit, tdm.ToMe(3))
    logits, trace = model.trace(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    assert trace.token_counts == [13, 10, 7, 4, 2] + [1] * (len(vit.blocks) - 5)


def test_multiply_accumulates():
    """On DeiT-S, the similarities left out."""
    vit = timm.create_model("deit_small_patch16_224")
    gmacs = [tdm.flops.count_macs(tdm.attach(vit, tdm.ToMe(r))) / 1e9 for r in (8, 13, 16)]
    assert [round(value, 3) for value in gmacs] == [3.416, 2.703, 2.291]


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "negative"),
        ([3, -2], ValueError, "negative"),
        (True, TypeError, "integer"),
        ("8", TypeError, "integer"),
        (2.5, TypeError, "integer"),
        ([], TypeError, "integer"),
        ([1, 2, 3.5], TypeError, "integer"),
        ((8, 3.0), ValueError, r"\[-1, 1\]"),
        ((8, float("nan")), ValueError, r"\[-1, 1\]"),
    ],
)
def test_bad_r(r, error, message):
    with pytest.raises(error, match=message):
        tdm.ToMe(r)


def test_takes_another_merger():
    """The schedule stays ToMe's; a merger that goes by importance gets it."""
    for merger in (tdm.TokenMerger(), tdm.Drop(), tdm.Cluster()):
        vit = timm.create_model("test_vit", img_size=64).eval()
        model = tdm.attach(vit, tdm.ToMe(2, merger=merger))
        assert model.trace(torch.randn(1, 3, 64, 64))[1].token_counts == [14, 12, 10, 8, 6, 4]
