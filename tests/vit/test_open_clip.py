"""open_clip's own image towers: as they are where nothing is reduced, as timm's of the same weights
where something is.
"""

from functools import partial

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

import tdm_lightning as tdm
from tests.helpers.exporting import check_compiled, check_exported

SHAPE = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2}
STRATEGIES = {
    "ward": lambda: tdm.WardTDM(0.7, (0, 2)),
    "tdm": lambda: tdm.TDM(0.7, (1, 2)),
    "evit": lambda: tdm.EViT(0.7, (1, 2)),
    "tome": lambda: tdm.ToMe(8),
    "mctf": lambda: tdm.MCTF(8),
}
#: open_clip's names in timm's words.
NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "transformer.resblocks": "blocks",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "ln_": "norm",
    "ls_1": "ls1",
    "ls_2": "ls2",
}


def make(cls=VisionTransformer, **changes):
    torch.manual_seed(0)
    vit = cls(**{**SHAPE, "output_dim": 16, **changes}).eval()
    for weight in vit.parameters():
        nn.init.normal_(weight, std=0.3)
    return vit


def in_timm(vit):
    """timm's model of the same weights."""
    twin = TimmViT(
        img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=16,
        pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    weights = {"head.bias": torch.zeros(16)}
    for name, value in vit.state_dict().items():
        if name == "proj":
            weights["head.weight"] = value.T
            continue
        for mine, theirs in NAMES.items():
            name = name.replace(mine, theirs)
        weights[name] = value.reshape(twin.get_parameter(name).shape)
    twin.load_state_dict(weights)
    return twin.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1}],
    ids=str,
)
@torch.no_grad()
def test_without_reduction_nothing_changes(images, changes):
    vit = make(**changes)
    for strategy in (tdm.Strategy(), tdm.TDM(1.0, (1,))):
        model = tdm.attach(vit, strategy)
        for found in (model(images), model.run(images).logits):
            torch.testing.assert_close(found, vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_it_decides_as_timm_does(images, name):
    vit = make()
    logits, trace = tdm.attach(vit, STRATEGIES[name]()).eval().trace(images)
    expected, other = tdm.attach(in_timm(vit), STRATEGIES[name]()).eval().trace(images)
    assert trace.token_counts == other.token_counts
    assert trace.token_counts[-1] < 64
    for mine, theirs in zip(trace.layers, other.layers, strict=True):
        assert torch.equal(mine.assignment, theirs.assignment)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("after", [False, True])
@torch.no_grad()
def test_an_average_counts_each_patch(images, after):
    """Of tokens that stand for several patches as of the patches themselves."""
    model = tdm.attach(make(pool_type="avg", final_ln_after_pool=after), tdm.ToMe((0, 8, 8, 8)))
    output = model.run(images, trace=True)
    dense = output.features[:, 1:].gather(
        1, output.trace.layers[-1].assignment.unsqueeze(2).expand(-1, -1, 32)
    )
    expected = model.vit.ln_post(dense.mean(dim=1)) if after else dense.mean(dim=1)
    torch.testing.assert_close(output.logits, expected @ model.vit.proj, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_it_compiles_and_exports(images):
    check_compiled(tdm.attach(make(), tdm.WardTDM(0.7, (1,))), images)
    check_exported(tdm.attach(make(), tdm.TDM(0.7, (1,))), images)


def test_it_trains_in_half_precision_with_dropped_patches(images):
    model = tdm.attach(make(patch_dropout=0.25).train(), tdm.TDM(0.7, (1,))).train()
    assert model._info.random_patches
    with torch.autocast("cpu", torch.bfloat16):
        output = model.run(images, trace=True)
    assert output.trace.token_counts == [48, 34, 34, 34]
    output.logits.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.vit.parameters())


@torch.no_grad()
def test_inside_clip(images):
    tower = {key: SHAPE[key] for key in ("image_size", "patch_size", "width", "layers")}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(16, {**tower, "head_width": 16}, text).eval()
    expected = clip.encode_image(images)
    assert tdm.attach(clip, tdm.WardTDM(0.8, (0, 2))) is clip
    assert isinstance(clip.visual, tdm.TokenReducedViT)
    found = clip.encode_image(images, normalize=True)
    assert found.shape == expected.shape
    assert not torch.allclose(found, expected)
    words = torch.randint(1, 64, (3, 8))
    assert clip(images, words)[0].shape == (2, 16)
    tdm.detach(clip)
    assert torch.equal(clip.encode_image(images), expected)


class OtherPool(VisionTransformer):
    def _pool(self, x):
        return super()._pool(x)


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: make(attentional_pool=True), "pools by attention"),
        (lambda: make(output_tokens=True), "tokens beside the pooled"),
        (lambda: make(OtherPool), "pools in its own way"),
        (lambda: make(qk_norm=True), "CustomResidualAttentionBlock"),
    ],
)
def test_what_runs_in_another_way_is_refused(make_it, match):
    with pytest.raises(tdm.errors.UnsupportedModelError, match=match):
        tdm.attach(make_it(), tdm.TDM(0.7, (1,)))


def test_images_of_another_size(images):
    with pytest.raises(ValueError, match="B×3×32×32 for this model"):
        tdm.attach(make(), tdm.TDM(0.7, (1,)))(images[..., :28])
