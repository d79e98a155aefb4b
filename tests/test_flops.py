"""Multiply-accumulates, to the integer of the formula."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.flops import count_macs, default_input_size, mac_report

PLAIN = {"tiny": 1_253_683_200, "small": 4_598_882_304, "base": 17_563_828_224}
INSIDE = {"tiny": 812_089_728, "small": 2_996_994_816, "base": 11_485_251_072}
FUSED = {"tiny": 820_712_448, "small": 3_029_280_768, "base": 11_609_985_024}


def deit(size):
    with torch.device("meta"):
        return timm.create_model(f"deit_{size}_patch16_224")


@pytest.mark.parametrize("size", PLAIN)
def test_published_models_to_the_integer(size):
    vit = deit(size)
    assert vit.blocks[0].attn.fused_attn
    assert count_macs(vit) == PLAIN[size]
    for strategy, wanted in [
        (tdm.TDM(1.0), PLAIN[size]),
        (tdm.TDM(0.7), INSIDE[size]),
        (tdm.EViT(0.7, fuse=False), INSIDE[size]),
        (tdm.EViT(0.7, merger=tdm.TokenMerger()), INSIDE[size]),
        (tdm.EViT(0.7), FUSED[size]),
    ]:
        assert count_macs(tdm.attach(vit, strategy)) == wanted


def test_parts_sum_to_the_whole_and_follow_the_formula():
    report = mac_report(tdm.attach(deit("small"), tdm.TDM(0.7)))
    width, entering = 384, 197
    for block in report.blocks:
        leaving = block.tokens + 1
        assert block.attention == 4 * entering * width**2 + 2 * entering**2 * width
        assert block.mlp == 8 * leaving * width**2
        assert (block.strategy > 0) == (block.index in (3, 6, 9))
        entering = leaving
    assert report.embed == 196 * 768 * width
    assert report.head == 1000 * width
    assert report.learned == 0
    assert (
        report.backbone
        == report.embed + report.head + sum(b.attention + b.mlp for b in report.blocks)
        == INSIDE["small"]
    )
    assert report.total == report.backbone + report.strategy
    assert report.plain == PLAIN["small"]
    assert report.reduction == pytest.approx(1 - INSIDE["small"] / PLAIN["small"])
    assert 0 < report.strategy < 0.01 * report.backbone


def test_the_merger_costs_what_its_products_cost():
    """Class rows of queries and keys that are there, inattentive distances N_i²·C and the
    bipartite similarity; gathering and adding up cost nothing.
    """
    report = mac_report(tdm.attach(deit("small"), tdm.TDM(0.7)))
    width, n = 384, 196
    for block in report.blocks:
        if block.strategy:
            keep = math.ceil(0.7 * n)
            row = (n + 1) * width
            similar = math.ceil(keep / 2) * (keep // 2) * width
            assert block.strategy == row + (n - keep) ** 2 * width + similar
            n = keep


@pytest.mark.parametrize("channels", [1, 3])
def test_input_size(channels):
    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        in_chans=channels,
        num_classes=5,
    )
    n = 17
    blocks = 2 * (12 * n * 32**2 + 2 * n**2 * 32)
    assert default_input_size(vit) == (channels, 32, 32)
    assert (
        count_macs(vit)
        == count_macs(vit, (channels, 32, 32))
        == 16 * 64 * channels * 32 + blocks + 5 * 32
    )
    flexible = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        dynamic_img_size=True,
        num_classes=5,
    )
    n = 37
    assert (
        count_macs(flexible, (3, 48, 48))
        == 36 * 64 * 3 * 32 + 2 * (12 * n * 32**2 + 2 * n**2 * 32) + 5 * 32
    )


def test_real_images_give_the_same_numbers_and_leave_the_model_alone():
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    model = tdm.attach(vit, tdm.TDM(0.5, layers=(1, 2)))
    model.train()
    assert mac_report(model) == mac_report(model, images=torch.randn(3, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_adaptive_strategies_need_images():
    class Adaptive(tdm.Strategy):
        adaptive = True

    model = tdm.attach(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), Adaptive()
    )
    with pytest.raises(ValueError, match="Adaptive keeps another number of tokens.*images="):
        count_macs(model)


def test_images_one_by_one():
    class Some(tdm.Strategy):
        adaptive = True

        def before_block(self, index, tokens):
            return tokens.packed(index, tokens.patches[..., 0] > 0) if index == 1 else tokens

    torch.manual_seed(0)
    model = tdm.attach(timm.create_model("test_vit", img_size=32, patch_size=8).eval(), Some())
    images = torch.randn(3, 3, 32, 32)
    costs = tdm.flops.image_costs(model, images)
    assert costs.macs.tolist() == [count_macs(model, images=image[None]) for image in images]
    counts = model.trace(images)[1].token_counts
    assert torch.equal(costs.tokens, torch.stack(counts, dim=1).double())
    assert costs.macs.mean() < count_macs(model, images=images)
