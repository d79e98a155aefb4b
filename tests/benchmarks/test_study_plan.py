"""What the study compares, and settings at equal cost."""

from dataclasses import replace

import pytest
import torch

import tdm_lightning as tdm
from benchmarks.study import ward
from benchmarks.study.ablate import VARIANTS, ablation_cells
from benchmarks.study.finetune import Recipe
from benchmarks.study.plain import Plain
from benchmarks.study.plan import (
    METHODS,
    RATES,
    Cell,
    Method,
    grid_cells,
)
from benchmarks.study.run import NoSetting, nearest, run_cell, solved
from tdm_lightning.slimming import select
from tests.helpers.studies import METHODS_BY_NAME, NAME, SHAPE, data
from tests.helpers.vits import lively


def test_every_cell_of_the_grid_has_its_own_name():
    cells = grid_cells(seeds=[1, 2])
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(cells) == 2 * (1 + (len(METHODS) - 1) * len(RATES))


def test_what_must_be_trained_is_left_out_where_nothing_is():
    left = {c.method.name for c in grid_cells()} - {
        c.method.name for c in grid_cells(trained=False)
    }
    assert left == {"DyViT", "DyViT+TDM", "Evo-ViT", "SPViT", "SPViT+TDM"}


def test_the_names_of_methods_are_checked():
    with pytest.raises(ValueError, match="no method Nothing.*TDM"):
        grid_cells(["Nothing"])


@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.name)
def test_every_variant_of_the_ablation_fits_the_studys_model(method, rate):
    import timm

    vit = timm.create_model(NAME, img_size=28, patch_size=2, in_chans=1, embed_dim=16, num_heads=2)
    strategy = method.make(rate)
    counts = tdm.attach(vit, strategy).trace(torch.zeros(1, 1, 28, 28))[1].token_counts
    assert counts == tdm.attach(vit, tdm.TDM(rate)).trace(torch.zeros(1, 1, 28, 28))[1].token_counts


def test_clusters_only_and_matching_only_are_what_they_say():
    splits = {method.name: method.make(0.5).merger.split(196, 98) for method in VARIANTS}
    assert splits["clusters only"].pairs == 0
    assert abs(splits["clusters only"].clusters - splits["default"].clusters) <= 1
    assert splits["matching only"].clusters == 1
    assert abs(splits["matching only"].pairs - splits["default"].pairs) <= 1
    assert (splits["neither"].clusters, splits["neither"].pairs) == (1, 1)


def test_ablation_cells():
    names = [cell.name for cell in ablation_cells()]
    assert len(set(names)) == len(names) == 2 * len(VARIANTS)


@torch.no_grad()
def test_every_part_of_wardtdm_makes_a_difference():
    import timm

    vit = lively(timm.create_model(NAME, num_classes=10, **{**SHAPE, "depth": 12})).eval()
    torch.nn.init.normal_(vit.head.weight)
    images = torch.randn(2, 1, 28, 28)
    answers = {
        method.name: tdm.attach(vit, method.make(0.5)).eval()(images)
        for method in ward.VARIANTS
        if method.look is None
    }
    different = {name: (a - answers["WardTDM"]).abs().max() for name, a in answers.items()}
    assert all(difference > 1e-4 for name, difference in different.items() if name != "WardTDM")


@pytest.mark.parametrize(
    "method",
    [METHODS_BY_NAME[name] for name in ("Plain", "EViT", "ToMe", "Evo-ViT")],
    ids=lambda m: m.name,
)
def test_settings_meet_tdms_budget_with_the_methods_own_work(checkpoint, method):
    plain = Plain.read(checkpoint)
    strategy, costs = solved(Cell(method, 1.0 if method.name == "Plain" else 0.7, 1), plain.vit)
    report = tdm.flops.mac_report(tdm.attach(plain.vit(strategy), strategy))
    assert report.total == pytest.approx(1e9 * costs["gmacs"])
    assert report.backbone == pytest.approx(1e9 * costs["gmacs_backbone"])
    assert costs["gmacs"] == pytest.approx(costs["gmacs_budget"], rel=0.01)


def test_a_budget_that_cannot_be_met_is_a_result(checkpoint):
    cell = Cell(Method("late", lambda rate: tdm.TopK(layers=(9,))), 0.2, 1)
    images = torch.zeros(2, 1, 28, 28), torch.zeros(2).long()
    record = run_cell(cell, Plain.read(checkpoint), data(), Recipe(0), images)
    assert record["setting"] is None
    assert "TopK" in record["reason"]


def test_methods_that_decide_image_by_image_meet_the_budget_in_the_mean(checkpoint):
    plain, images = Plain.read(checkpoint), torch.randn(4, 1, 28, 28)
    rates = [step / 20 for step in range(6, 20)]
    method = replace(METHODS_BY_NAME["MPM"], settings=[tdm.EViT(rate) for rate in rates])

    def under(strategy):
        return plain.under(strategy).model.eval()

    strategy, costs = nearest(Cell(method, 0.7, 1), plain.vit, under, images)
    budget = 1e9 * costs["gmacs_budget"]
    distance = {
        rate: abs(tdm.flops.macs_with(plain.vit(strategy), tdm.EViT(rate), total=True) - budget)
        for rate in rates
    }
    assert strategy.keep_rate == min(rates, key=distance.__getitem__)
    alone = replace(method, settings=[tdm.MPM(layers=(9,))])
    with pytest.raises(NoSetting, match="in the mean"):
        nearest(Cell(alone, 0.3, 1), plain.vit, under, images)


def test_settings_of_methods_that_decide_image_by_image_go_from_little_to_much():
    thresholds = [strategy.threshold for strategy in METHODS_BY_NAME["MaMe"].settings]
    assert thresholds == sorted(thresholds)
    blocks = [strategy.layers for strategy in METHODS_BY_NAME["MPM"].settings]
    assert (blocks[0], blocks[-1]) == (tuple(range(12)), (11,))


def test_psvits_masks_come_from_training_images():
    import timm

    vit = lively(timm.create_model(NAME, num_classes=10, **SHAPE))
    given, images = (
        tdm.PSViT(0.8),
        torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    )
    chosen = METHODS_BY_NAME["PS-ViT"].look(given, vit, [images])
    masks, placeholder = (
        tdm.attach(vit, strategy).strategy for strategy in (chosen, tdm.PSViT(0.8))
    )
    assert masks.token_counts == placeholder.token_counts
    assert not torch.equal(masks.kept, placeholder.kept)
    assert torch.equal(masks.kept, select(vit, [images], masks.token_counts).masks)
