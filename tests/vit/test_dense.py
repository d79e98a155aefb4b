"""Dense features: every original patch has the feature of the token that holds it, in its own
place.
"""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tests.vit.test_families import MODELS, made

STRATEGIES = {
    "tdm": lambda: tdm.TDM(0.5, (1, 2)),
    "evit": lambda: tdm.EViT(0.5, (1, 2)),
    "evit-drop": lambda: tdm.EViT(0.5, (1, 2), fuse=False),
    "dyvit": lambda: tdm.DyViT(0.5, (1, 2)),
    "evovit": lambda: tdm.EvoViT(0.5, layers=(1, 2, 3)),
    "tome": lambda: tdm.ToMe(4),
    "mpm": lambda: tdm.MPM((1, 2)),
    "dpcknn": lambda: tdm.DPCKNN(0.5, (1, 2)),
    "topk": lambda: tdm.TopK(0.5, (1, 2)),
    "random": lambda: tdm.Random(0.5, (1, 2)),
    "psvit": lambda: tdm.PSViT(counts=(20, 12, 6, 2)),
    "avit": lambda: tdm.AViT(gate_scale=5.0, gate_center=0.5),
    "spvit": lambda: tdm.SPViT((1, 2)),
    "iared2": lambda: tdm.IARED2(groups=2, threshold=0.73),
}
HOLDING = {"tdm", "evit", "evovit", "tome", "dpcknn", "spvit", "mpm"}  # methods that lose no patch


def wide(**kwargs):
    """A ViT on images of 32×48 pixels, 4×6 patches."""
    torch.manual_seed(3)
    shape = {
        "img_size": (32, 48),
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 5,
    }
    vit = VisionTransformer(**{**shape, "reg_tokens": 1, "global_pool": "avg", **kwargs}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return vit


@pytest.fixture
def images():
    torch.manual_seed(4)
    return torch.randn(3, 3, 32, 48)


def reduced(name):
    model = tdm.attach(wide(), STRATEGIES[name]())
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0)
    return model.eval()


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_every_patch_has_the_feature_of_its_token(images, name):
    """Against what the hook points saw: a pass of its own, whose tokens the trace hands out patch
    by patch.
    """
    model = reduced(name)
    seen = {}
    handles = [
        point.register_forward_hook(lambda point, given, x, index=index: seen.update({index: x}))
        for index, point in enumerate(model.hook_points)
    ]
    torch.manual_seed(6)  # for the strategy that draws
    layers = {layer.index: layer.assignment for layer in model.trace(images)[1].layers}
    for handle in handles:
        handle.remove()
    torch.manual_seed(6)
    maps = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    held = torch.arange(24).expand(3, -1)
    for index, dense in enumerate(maps):
        held = layers.get(index, held)
        assert dense.shape == (3, 24, 32)
        assert torch.equal(
            dense.abs().sum(dim=2) == 0, held < 0
        )  # zero where the patch is gone, and only there
        if len(seen[index]) < len(images):
            continue  # an image has left the batch
        inside = seen[index].shape[1] - 2
        for image, patch in (
            ((held >= 0) & (held < inside)).nonzero().tolist()
        ):  # what is parked no hook has seen
            torch.testing.assert_close(
                dense[image, patch], seen[index][image, 2 + held[image, patch]]
            )
    if name in HOLDING:
        assert (held >= 0).all()
    if name != "evovit":  # whose patches all come back as they were
        assert all(len(each.unique(dim=0)) < 24 for each in maps[-1])


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_all_forms_of_the_same_maps(images, name):
    model = reduced(name)

    def asked(**kwargs):
        torch.manual_seed(6)
        return model.forward_intermediates(images, **kwargs)

    final, maps = asked(return_prefix_tokens=True)
    assert len(maps) == 4
    assert all(
        dense.shape == (3, 32, 4, 6) and prefix.shape == (3, 2, 32) for dense, prefix in maps
    )
    torch.manual_seed(6)
    torch.testing.assert_close(final, model.forward_features(images))
    last, one = (pair[0] for pair in (maps[3], maps[1]))
    assert all(map(torch.equal, asked(indices=[1, 3], intermediates_only=True), (one, last)))
    (sequence,) = asked(indices=1, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(sequence, last.flatten(2).transpose(1, 2))
    (normed,) = asked(indices=1, norm=True, intermediates_only=True)
    there = last.abs().sum(dim=1, keepdim=True) > 0
    wanted = model.vit.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * there
    torch.testing.assert_close(normed, wanted)
    (early,) = asked(indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early, one)
    torch.manual_seed(6)
    assert torch.equal(model.get_intermediate_layers(images, reshape=True)[0], last)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family_gives_timms_maps_where_nothing_is_reduced(name):
    vit, images = made(name), torch.randn(2, 3, 32, 32)
    model = tdm.attach(vit, tdm.TDM(1.0, (1,)))
    for asked in ({"output_fmt": "NLC"}, {"norm": True, "indices": [0, 2], "stop_early": True}):
        final, maps = model.forward_intermediates(images, **asked)
        wanted_final, wanted = vit.forward_intermediates(images, **asked)
        torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(final, wanted_final, atol=1e-5, rtol=1e-4)


def test_stopping_early_runs_no_further_block(images):
    model = reduced("tdm")
    blocks = []
    for index, point in enumerate(model.hook_points):
        point.register_forward_hook(lambda *_, index=index: blocks.append(index))
    model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert blocks == [0, 1]


@pytest.mark.parametrize("name", sorted(HOLDING - {"spvit"}))
def test_gradients_flow_from_every_patch_through_the_merging(images, name):
    model = reduced(name)
    images.requires_grad_(True)
    (dense,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    dense.square().sum().backward()
    gradient = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5))
    assert (gradient > 0).all()
    assert model.vit.blocks[0].attn.qkv.weight.grad.isfinite().all()


@torch.no_grad()
def test_images_of_a_free_size():
    model = tdm.attach(wide(dynamic_img_size=True, dynamic_img_pad=True), tdm.TDM(0.5, (1,)))
    (dense,) = model.forward_intermediates(
        torch.randn(1, 3, 40, 30), indices=1, intermediates_only=True
    )
    assert dense.shape == (1, 32, 5, 4)
    for size in ((4, 48), (32, 7)):
        with pytest.raises(
            ValueError, match=f"an image of {size[0]}×{size[1]} is smaller than one patch, 8×8"
        ):
            model(torch.zeros(1, 3, *size))
