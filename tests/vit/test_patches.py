"""The patch embedding as reshape and linear: the same numbers under the same names."""

import copy

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tdm_lightning as tdm

SMALL = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
MODELS = {
    "vit": lambda: VisionTransformer(**SMALL),
    "oblong": lambda: VisionTransformer(**{**SMALL, "patch_size": (8, 16)}),
    "any size": lambda: VisionTransformer(**SMALL, dynamic_img_size=True),
    "padded": lambda: VisionTransformer(**SMALL, dynamic_img_size=True, dynamic_img_pad=True),
    "pre-norm": lambda: VisionTransformer(**SMALL, pre_norm=True),
    "eva": lambda: Eva(**SMALL),
    "beit": lambda: Beit(**SMALL),
    "reduced": lambda: tdm.attach(VisionTransformer(**SMALL), tdm.TDM(0.5, (1,))),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_and_gradients(name):
    model = MODELS[name]().eval()
    shape = {"any size": (40, 24), "padded": (35, 50)}.get(name, (32, 48))
    images = torch.randn(2, 3, *shape)
    names, linear = list(model.state_dict()), tdm.linear_patches(copy.deepcopy(model))
    assert list(linear.state_dict()) == names
    for layout in (torch.contiguous_format, torch.channels_last):
        expected = model(images)
        found = linear(images.to(memory_format=layout))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found.square().sum().backward()
        model.zero_grad()
        expected.square().sum().backward()
        for mine, other in zip(linear.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)
        linear.zero_grad()
    assert not any(type(inner) is nn.Conv2d for inner in linear.modules())


def test_it_is_reversible_and_costs_the_same():
    vit = timm.create_model("test_vit").eval()
    images, macs = torch.randn(1, 3, 160, 160), tdm.flops.count_macs(vit)
    proj, expected = vit.patch_embed.proj, vit(images)
    assert tdm.linear_patches(vit) is vit
    assert tdm.linear_patches(vit) is vit
    assert tdm.flops.count_macs(vit) == macs
    assert vit.patch_embed.proj is proj
    assert tdm.linear_patches(vit, on=False).patch_embed.proj is proj
    assert type(proj) is nn.Conv2d
    assert torch.equal(vit(images), expected)


def test_pixels_that_fill_no_window_are_left_out():
    proj = nn.Conv2d(3, 8, 4, 4)
    embed = timm.layers.PatchEmbed(img_size=None, patch_size=4, embed_dim=8)
    embed.proj = proj
    images = torch.randn(2, 3, 10, 7)
    expected = proj(images)
    tdm.linear_patches(embed)
    torch.testing.assert_close(proj(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"stride": 3}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, None]
)
def test_other_convolutions_are_refused(options):
    vit = VisionTransformer(**SMALL)
    if options is None:
        vit = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    else:
        vit.patch_embed.proj = nn.Conv2d(3, 6, 4, **{"stride": 4, **options})
    with pytest.raises(ValueError, match="found no patch embedding in .*plain patchify"):
        tdm.linear_patches(vit)


@torch.no_grad()
def test_under_compile_and_export():
    vit = tdm.linear_patches(VisionTransformer(**SMALL).eval())
    images = torch.randn(2, 3, 32, 48)
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), vit(images))
    program = torch.export.export(vit, (images,))
    torch.testing.assert_close(program.module()(images), vit(images))
