"""Every timm class of ViTs: the same as timm where nothing is reduced, and positions that follow
the tokens.
"""

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

import tdm_lightning as tdm
from benchmarks.sweep.examine import Shuffled
from tdm_lightning.strategies import Strategy
from tests.helpers.exporting import check_exported

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}


def beit(**arguments):
    return timm.create_model("beit_base_patch16_224", **{**SMALL, **arguments})


def naflex(**arguments):
    settings = {
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "pos_embed_grid_size": (4, 4),
        **arguments,
    }
    model = NaFlexVit(NaFlexVitCfg(**settings), num_classes=10, img_size=32)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


MODELS = {
    "eva": lambda: Eva(**SMALL, use_rot_pos_emb=True),
    "eva separate projections": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True
    ),
    "eva post-norm": lambda: Eva(**SMALL, use_rot_pos_emb=True, use_post_norm=True),
    "eva registers, no class token": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, class_token=False, num_reg_tokens=2, global_pool="avg"
    ),
    "eva DINOv3": lambda: Eva(
        **SMALL,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
    ),
    "eva mixed": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", init_values=0.1
    ),
    "eva attention pooling": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, global_pool="map", use_fc_norm=False
    ),
    "eva without RoPE": lambda: Eva(**SMALL, use_rot_pos_emb=False, qk_norm=True),
    "beit": lambda: beit(global_pool="token"),
    "beit averaged": lambda: beit(global_pool="avg"),
    "beit shared": lambda: beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "relpos": lambda: VisionTransformerRelPos(**SMALL),
    "relpos class token": lambda: VisionTransformerRelPos(
        **SMALL, class_token=True, global_pool="token", qk_norm=True
    ),
    "relpos network": lambda: VisionTransformerRelPos(**SMALL, rel_pos_type="mlp"),
    "relpos shared": lambda: VisionTransformerRelPos(**SMALL, shared_rel_pos=True),
    "naflex": lambda: naflex(class_token=True, global_pool="token"),
    "naflex averaged": lambda: naflex(reg_tokens=2, global_pool="avg"),
    "naflex RoPE": lambda: naflex(
        class_token=True, rope_type="axial", attn_type="eva", pos_embed="none"
    ),
}


def made(name):
    """A model in which every weight and table counts, so that a mistake in any of them shows."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_strategy_it_is_timms(name, images):
    vit = made(name)
    with torch.no_grad():
        torch.testing.assert_close(
            tdm.attach(vit, Strategy())(images), vit(images), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            tdm.attach(vit, tdm.TDM(1.0, (1, 2)))(images), vit(images), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", MODELS)
def test_positions_move_with_the_tokens(name, images):
    vit = made(name)
    with torch.no_grad():
        torch.testing.assert_close(
            tdm.attach(vit, Shuffled())(images), vit(images), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    "strategy", [tdm.TDM(0.5, (1, 2)), tdm.EViT(0.5, (1, 2)), tdm.ToMe(3), tdm.DPCKNN(0.5, (1, 2))]
)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_fall_and_gradients_flow(name, strategy, images):
    vit = made(name)
    model = tdm.attach(vit, type(strategy).from_config(strategy.config()))
    logits, trace = model.trace(images)
    assert trace.token_counts[-1] < trace.token_counts[0]
    assert (logits - vit(images)).abs().max() > 1e-6
    logits.square().sum().backward()
    assert all(
        parameter.grad.isfinite().all()
        for parameter in vit.parameters()
        if parameter.grad is not None
    )
    assert vit.blocks[-1].norm2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_the_attention_that_timm_computes(name, images):
    """The row beside the fused kernel, against the softmax of the model's own explicit
    attention.
    """
    vit = made(name)
    seen = {}
    for index, block in enumerate(vit.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(
            lambda module, inputs, out, index=index: seen.__setitem__(index, inputs[0])
        )
    with torch.no_grad():
        vit(images)
        trace = tdm.attach(vit, tdm.EViT(0.5, (1,), fuse=False)).trace(images)[1]
    prefix = vit.num_prefix_tokens
    weights = seen[1]
    has_class = (
        getattr(vit, "cls_token", None) is not None
        or getattr(getattr(vit, "embeds", None), "cls_token", None) is not None
    )
    expected = (
        weights[:, :, 0, prefix:].mean(1)
        if has_class
        else weights[:, :, prefix:, prefix:].mean((1, 2))
    )
    torch.testing.assert_close(trace.layers[0].importance, expected, atol=1e-6, rtol=1e-4)


def placed(model, images, block):
    """The tokens behind the reduction in a block, and what its trace says."""
    seen, original = [], type(model.strategy).after_attention

    def after_attention(self, index, tokens, observed):
        seen.append(original(self, index, tokens, observed))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.strategy), "after_attention", after_attention)
        trace = model.run(images, trace=True).trace
    (layer,) = (layer for layer in trace.layers if layer.index == block)
    return seen[block], layer


def test_under_rope_a_merged_token_stands_where_its_most_important_member_stood(images):
    tokens, layer = placed(tdm.attach(made("eva"), tdm.TDM(0.5, (1,))), images, 1)
    for image in range(len(images)):
        for token in range(tokens.count):
            members = (layer.assignment[image] == token).nonzero().flatten()
            assert (
                tokens.positions.index[image, token]
                == members[layer.importance[image, members].argmax()]
            )


@pytest.mark.parametrize("name", ["beit", "relpos"])
def test_under_a_relative_bias_a_merged_token_stands_in_the_middle_of_its_patches(name, images):
    model = tdm.attach(made(name), tdm.TDM(0.5, (1,)))
    tokens, layer = placed(model, images, 1)
    columns = model.vit.patch_embed.grid_size[1]
    for image in range(len(images)):
        for token in range(tokens.count):
            members = (layer.assignment[image] == token).nonzero().flatten().double()
            row, column = (members // columns).mean().round(), (members % columns).mean().round()
            assert tokens.positions.index[image, token] == row * columns + column


@pytest.mark.parametrize("name", ["eva", "beit", "relpos"])
def test_strategies_with_stand_ins_are_refused(name):
    with pytest.raises(TypeError, match="where a token is"):
        tdm.attach(made(name), tdm.EvoViT(0.5, layers=(1,)))


@pytest.mark.parametrize("name", ["eva", "beit", "relpos"])
def test_policies_are_refused_in_training(name, images):
    model = tdm.attach(made(name), tdm.DyViT(0.7, (1,))).train()
    with pytest.raises(TypeError, match="policy"):
        model(images)


def test_an_exported_program_agrees(images):
    """Of the class that `tests/export` leaves out."""
    with torch.no_grad():
        check_exported(tdm.attach(made("eva mixed"), tdm.TDM(0.5, (1,))), images)


def test_dense_features_of_a_rotary_model(images):
    model = tdm.attach(made("eva"), tdm.TDM(0.5, (1, 2)))
    maps = model.forward_intermediates(images, indices=[0, 3], intermediates_only=True)
    assert [tuple(each.shape) for each in maps] == [(3, 32, 4, 4)] * 2


def test_other_image_sizes(images):
    vit = Eva(**{**SMALL, "dynamic_img_size": True}, use_rot_pos_emb=True).eval()
    model = tdm.attach(vit, tdm.TDM(0.5, (1,)))
    assert model.trace(torch.zeros(1, 3, 48, 32))[1].token_counts == [24, 12, 12, 12]


def test_an_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="smaller than one patch"):
        tdm.attach(naflex(class_token=True, global_pool="token"), tdm.TDM(0.5, (1,)))(
            torch.zeros(1, 3, 4, 4)
        )


def test_a_models_own_size_may_be_no_multiple_of_the_patch():
    vit = VisionTransformer(**{**SMALL, "img_size": 36}).eval()
    images = torch.randn(1, 3, 36, 36)
    with torch.no_grad():
        torch.testing.assert_close(tdm.attach(vit, tdm.TDM(1.0, (1,)))(images), vit(images))
    assert tdm.attach(vit, tdm.TDM(0.5, (1,))).trace(images)[1].token_counts == [16, 8, 8, 8]
