"""Finding the ViT in a foreign module, and watching its tokens."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.vit.find import find_vit, hook_blocks, inner_vit


def small():
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3
    ).eval()


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def test_finds_a_plain_one_at_any_depth():
    vit = small()
    assert find_vit(Holder(encoder=nn.Sequential(nn.Identity(), vit))) is vit
    assert find_vit(vit) is vit


def test_a_reduced_one_stands_for_the_timm_model_inside_it():
    vit = small()
    model = tdm.attach(vit, tdm.TDM(layers=(1,)))
    assert find_vit(Holder(backbone=vit, student=model)) is model
    assert inner_vit(model) is inner_vit(vit) is vit


def test_none_and_several_are_errors_that_say_where():
    with pytest.raises(ValueError, match="no ViT in Holder"):
        find_vit(Holder(net=nn.Linear(2, 2)))
    student, teacher = tdm.attach(small(), tdm.TDM(layers=(1,))), small()
    both = Holder(net=Holder(student=student, teacher=teacher))
    with pytest.raises(
        ValueError,
        match=r"2 ViTs.*'net\.student' \(TokenReducedViT\).*'net\.teacher' \(VisionTransformer\)",
    ):
        find_vit(both)
    assert find_vit(both, "net.student") is student
    assert find_vit(both, "net.teacher") is teacher
    with pytest.raises(ValueError, match="no submodule 'net.pupil'"):
        find_vit(both, "net.pupil")


def test_taps_see_the_same_tokens_in_a_plain_model_as_at_keep_rate_1():
    vit, images = small(), torch.randn(2, 3, 32, 32)
    seen = {}
    for name, model in {
        "plain": vit,
        "reduced": tdm.attach(vit, tdm.TDM(1.0, layers=(1,))),
    }.items():
        seen[name] = {}
        with hook_blocks(
            model, lambda index, tokens, valid, kept=seen[name]: kept.__setitem__(index, tokens)
        ):
            model(images)
        model(images * 2)  # outside: not seen
    assert list(seen["plain"]) == list(seen["reduced"]) == [0, 1, 2, 3]
    for index, tokens in seen["plain"].items():
        torch.testing.assert_close(tokens, seen["reduced"][index])


def test_taps_are_removed_on_errors_and_copies_show_nothing():
    model = tdm.attach(small(), tdm.TDM(0.5, layers=(1,)))
    seen = []
    with (  # noqa: PT012 - what happens before the error is what is tested
        pytest.raises(RuntimeError),
        hook_blocks(model, lambda index, tokens, valid: seen.append(tokens.shape[1])),
    ):
        copy.deepcopy(model)(torch.zeros(1, 3, 32, 32))
        assert seen == []
        model(torch.zeros(1, 3, 32, 32))
        raise RuntimeError
    assert seen == [17, 9, 9, 9]
    assert not any(point._forward_hooks for point in model.hook_points)
