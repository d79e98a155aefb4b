"""The keep rate that meets a budget."""

import pytest
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.budget import at_budget
from tdm_lightning.sparsity import Structured, Unstructured

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def vit():
    """0.054 GMACs."""
    return VisionTransformer(img_size=224, embed_dim=64, depth=3, num_heads=2, num_classes=10)


@pytest.mark.parametrize(
    "strategy", [tdm.TDM(layers=LAYERS), tdm.EViT(layers=LAYERS, fuse=False)], ids=["tdm", "evit"]
)
@pytest.mark.parametrize("gmacs", [0.04, 0.025])
def test_meets_the_budget_and_no_larger_rate_does(vit, strategy, gmacs):
    rate = tdm.solve_keep_rate(vit, strategy, gmacs)

    def cost(keep_rate):
        chosen = type(strategy)(
            **{
                **{n: getattr(strategy, n) for n in strategy.config()["init_args"]},
                "keep_rate": keep_rate,
            }
        )
        return tdm.flops.count_macs(tdm.attach(vit, chosen))

    assert cost(rate) <= gmacs * 1e9 < cost(round(rate + 1e-3, 6))
    assert strategy.keep_rate == 0.7


def test_a_reduced_model_counts_as_its_timm_model(vit):
    reduced = tdm.attach(vit, tdm.EViT(0.3, LAYERS))
    assert tdm.solve_keep_rate(reduced, tdm.TDM(layers=LAYERS), 0.03) == tdm.solve_keep_rate(
        vit, tdm.TDM(layers=LAYERS), 0.03
    )


def test_resolution(vit):
    assert tdm.solve_keep_rate(vit, tdm.TDM(layers=LAYERS), 0.04, resolution=0.25) in (0.5, 0.75)


def test_a_generous_budget_reduces_nothing(vit):
    assert tdm.solve_keep_rate(vit, tdm.TDM(layers=LAYERS), 1.0) == 1.0


def test_a_budget_that_cannot_be_met(vit):
    with pytest.raises(
        ValueError, match=r"TDM cannot meet 0\.01 GMACs: its cheapest setting costs 0\.0"
    ):
        tdm.solve_keep_rate(vit, tdm.TDM(layers=LAYERS), 0.01)


@pytest.mark.parametrize("gmacs", [0, -1, float("nan")])
def test_a_budget_that_is_none(vit, gmacs):
    with pytest.raises(ValueError, match="gmacs must be"):
        tdm.solve_keep_rate(vit, tdm.TDM(layers=LAYERS), gmacs)


def test_a_strategy_without_a_keep_rate(vit):
    with pytest.raises(TypeError, match="Strategy has no keep rate"):
        tdm.solve_keep_rate(vit, tdm.Strategy(), 0.9)


def test_tome_merges_as_little_as_the_budget_allows(vit):
    solved = at_budget(vit, tdm.ToMe(1, proportional_attention=False), 0.04)
    assert not solved.proportional_attention
    r = solved.schedule.fewer(3)
    assert max(r) - min(r) <= 1
    assert r == sorted(r, reverse=True)

    def cost(total):
        shares = [total // 3 + (block < total % 3) for block in range(3)]
        return tdm.flops.count_macs(tdm.attach(vit, tdm.ToMe(shares)))

    assert cost(sum(r)) <= 0.04e9 < cost(sum(r) - 1)
    assert at_budget(vit, tdm.ToMe(9), 1.0).r == 0
    with pytest.raises(ValueError, match=r"ToMe cannot meet 0\.01 GMACs"):
        at_budget(vit, tdm.ToMe(), 0.01)


def test_a_strategy_at_a_budget_keeps_its_other_settings(vit):
    given = tdm.EViT(0.9, LAYERS, fuse=False)
    solved = at_budget(vit, given, 0.04)
    assert (solved.keep_rate, solved.layers, solved.fuse) == (
        tdm.solve_keep_rate(vit, given, 0.04),
        LAYERS,
        False,
    )
    assert given.keep_rate == 0.9


def test_layers_that_do_not_exist_are_not_a_matter_of_budget(vit):
    with pytest.raises(ValueError, match=r"^layers \[9\] do not exist"):
        tdm.solve_keep_rate(vit, tdm.TDM(layers=(9,)), 0.04)


def test_spvits_targets_are_solved_for_together(vit):
    given = tdm.SPViT(layers=LAYERS, fixed_count=True, package="mean")
    solved = at_budget(vit, given, 0.04)
    first, second = solved.targets
    assert solved.package == "mean"
    assert second == pytest.approx(first**2, abs=1e-6)

    def cost(share):
        targets = [share, round(share**2, 6)]
        return tdm.flops.count_macs(
            tdm.attach(
                vit, tdm.SPViT(layers=LAYERS, fixed_count=True, package="mean", targets=targets)
            )
        )

    assert cost(first) <= 0.04e9 < cost(round(first + 1e-3, 3))
    assert tdm.flops.count_macs(tdm.attach(vit, solved)) == cost(first)


def test_svites_heads_and_units_are_solved_for_together(vit):
    masks = at_budget(vit, tdm.SViTE(interval=7), 0.04).masks
    assert masks.heads == masks.units

    def cost(share):
        return tdm.flops.count_macs(tdm.attach(vit, tdm.SViTE(Structured(share, share))))

    assert cost(masks.heads) <= 0.04e9 < cost(round(masks.heads + 1e-3, 3))


def test_a_stack_turns_the_member_that_reduces_tokens(vit):
    stacked = tdm.Stack([tdm.SViTE(Structured(0.5, 0.5)), tdm.TDM(layers=LAYERS)])
    solved = at_budget(vit, stacked, 0.025)
    assert solved.members[0].masks.heads == 0.5
    assert solved.members[1].keep_rate < 1
    assert tdm.flops.count_macs(tdm.attach(vit, solved)) <= 0.025e9
    alone = at_budget(vit, tdm.Stack([tdm.SViTE()]), 0.04).members[0]
    assert alone.config() == at_budget(vit, tdm.SViTE(), 0.04).config()


@pytest.mark.parametrize(
    "strategy",
    [tdm.SPViT(), tdm.AViT(), tdm.SViTE(Unstructured()), tdm.Stack([])],
    ids=lambda strategy: type(strategy).__name__,
)
def test_methods_whose_cost_no_setting_decides(vit, strategy):
    with pytest.raises(
        TypeError, match="has no keep rate or other setting that alone decides what it costs"
    ):
        at_budget(vit, strategy, 0.04)
