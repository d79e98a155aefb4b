"""WardMerger: what it sees, where it merges, and what it refuses."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.core import Role, Seen
from tdm_lightning.errors import ReductionError, SettingError
from tdm_lightning.ops import joined, ward_leaders
from tests.helpers.vits import lively


def make_vit(**kwargs):
    torch.manual_seed(3)
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
    return lively(VisionTransformer(num_classes=5, **{**arguments, **kwargs}).eval())


def seen(n=20, **changes):
    torch.manual_seed(0)
    parts = {
        "x": torch.randn(2, n, 8),
        "size": torch.randint(1, 5, (2, n)).float(),
        "importance": torch.rand(2, n),
        "keys": torch.randn(2, n, 4),
    }
    return Seen(**{**parts, **changes})


def test_groups_become_the_means_of_their_patches():
    given = seen()
    found = tdm.WardMerger(protect=0)(given, 9)
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (given.x, given.keys)]
    group = joined(ward_leaders(torch.cat(unit, dim=-1), given.size, 9))
    assert torch.equal(found.assignment, group)
    for image in range(2):
        for token in range(9):
            members = group[image] == token
            size = given.size[image, members]
            mean = (size[:, None] * given.x[image, members]).sum(0) / size.sum()
            torch.testing.assert_close(found.x[image, token], mean)
            assert found.size[image, token] == size.sum()
            role = Role.MATCHED if members.sum() > 1 else Role.KEPT
            assert (found.role[image, members] == role).all()


def test_protected_tokens_take_no_part_and_keep_their_order():
    given = seen()
    found = tdm.WardMerger(protect=0.25)(given, 8)
    for image in range(2):
        best = given.importance[image].topk(5).indices
        slots = found.assignment[image, best]
        assert len(set(slots.tolist())) == 5
        for place, slot in zip(best, slots, strict=True):
            assert (found.assignment[image] == slot).sum() == 1
            assert torch.equal(found.x[image, slot], given.x[image, place])
        order = best.sort().values
        assert (found.assignment[image, order].diff() > 0).all()
        rest = [place for place in range(20) if place not in best]
        group = ward_leaders(
            torch.cat(
                [
                    torch.nn.functional.normalize(part[image : image + 1, rest], dim=-1)
                    for part in (given.x, given.keys)
                ],
                dim=-1,
            ),
            given.size[image : image + 1, rest],
            3,
        )
        assert torch.unique(found.assignment[image, rest]).numel() == 3
        together = group[0][:, None] == group[0]
        mine = found.assignment[image, rest]
        assert torch.equal(mine[:, None] == mine, together)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: tdm.WardTDM(0.7, (1, 3), protect=0.1),
        lambda: tdm.WardTDM(0.9, "all", rounds=1, protect=0),
        lambda: tdm.TDM(0.7, (1, 3), tdm.WardMerger(None)),
        lambda: tdm.EViT(0.7, (1, 3), merger=tdm.WardMerger(protect=0.1)),
        lambda: tdm.DyViT(0.7, (1, 3), tdm.WardMerger(protect=0.1)),
        lambda: tdm.EvoViT(0.7, layers=(2, 4), merger=tdm.WardMerger()),
        lambda: tdm.SPViT((1, 3), (0.5, 0.25), tdm.WardMerger(), fixed_count=True),
        lambda: tdm.DPCKNN(0.7, (1, 3), merger=tdm.WardMerger(protect=0)),
        lambda: tdm.ToMe(4, merger=tdm.WardMerger()),
        lambda: tdm.ToMe(keep_rate=0.8),
    ],
)
@torch.no_grad()
def test_it_merges_wherever_tokens_are_given_up(strategy):
    strategy = strategy()
    pool = {"global_pool": "avg"} if isinstance(strategy, tdm.EvoViT) else {}
    model = tdm.attach(make_vit(**pool), strategy)
    images = torch.randn(3, 3, 32, 32)
    logits, trace = model.trace(images)
    assert logits.isfinite().all()
    assert trace.layers
    for layer in trace.layers:
        assert (layer.assignment >= 0).all()
    for image in range(3):
        torch.testing.assert_close(model(images[image : image + 1])[0], logits[image])
    again = tdm.Strategy.from_config(strategy.config())
    assert again.config() == strategy.config()


@pytest.mark.parametrize(
    "name",
    ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"],
)
@torch.no_grad()
def test_positions_class_tokens_and_pooling_of_other_models(name):
    sizes = {"eva02_tiny_patch14_224": 56, "beit_base_patch16_224": 64}
    arguments = {"img_size": sizes.get(name, 64), "depth": 4, "num_classes": 3}
    if name.startswith("beit"):
        arguments |= {"embed_dim": 48, "num_heads": 2}
    model = tdm.attach(timm.create_model(name, **arguments).eval(), tdm.WardTDM(0.6, (1, 2)))
    logits, trace = model.trace(torch.randn(2, 3, arguments["img_size"], arguments["img_size"]))
    assert logits.isfinite().all()
    n = trace.token_counts[0]
    assert trace.token_counts[-1] < 0.4 * n


def test_what_cannot_be_reached_is_refused_with_the_lowest_rate():
    with pytest.raises(SettingError, match=r"leave at least 10 of 64 tokens.*rate there is 0\.156"):
        tdm.attach(make_vit(), tdm.WardTDM(0.1, (1,), protect=0.1))
    with pytest.raises(SettingError, match="at most halve leave at least 32 of 64"):
        tdm.attach(make_vit(), tdm.WardTDM(0.3, "all", rounds=1, protect=0))
    with pytest.raises(SettingError, match="cheapest setting costs 0\\.00"):
        tdm.solve_keep_rate(make_vit(), tdm.WardTDM(0.3, (4,), rounds=1), gmacs=1e-4)
    for bad in ({"rounds": 0}, {"protect": 1.0}, {"protect": -0.1}, {"rounds": True}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            tdm.WardMerger(**bad)
    with pytest.raises(SettingError, match="two schedules"):
        tdm.ToMe(8, keep_rate=0.9)


@pytest.mark.parametrize("n", [2, 3])
def test_few_tokens(n):
    found = tdm.WardMerger(protect=0.1)(seen(n), 1)
    assert found.assignment.eq(0).all()
    torch.testing.assert_close(found.size[:, 0], seen(n).size.sum(1))


def test_equal_tokens():
    found = tdm.WardMerger(protect=0)(seen(x=torch.ones(2, 20, 8), keys=torch.ones(2, 20, 4)), 6)
    assert torch.allclose(found.x, torch.ones(2, 6, 8))
    assert torch.equal(found.size.sum(1), seen().size.sum(1))


def test_features_that_are_not_finite_are_named():
    x = seen().x.clone()
    x[1, 4, 2] = torch.nan
    with pytest.raises(ReductionError, match="features of 1 of 40 tokens are not finite"):
        tdm.WardMerger()(seen(x=x), 9)
