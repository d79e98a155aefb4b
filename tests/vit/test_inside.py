"""A ViT inside a larger model is reduced in its place, and comes back as it was."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import tdm_lightning as tdm

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 0,
}


def strategy():
    return tdm.TDM(0.5, (1, 2))


class Tower(nn.Module):
    """An image tower as open_clip builds it around a timm model."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(32, 8)

    def forward(self, images):
        return self.head(self.trunk(images))


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Tower(VisionTransformer(**SMALL))
        self.text = nn.Embedding(5, 8)

    def forward(self, images, words):
        return self.visual(images) @ self.text(words).T


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("path", [None, "visual", "visual.trunk"])
@torch.no_grad()
def test_a_tower_is_reduced_in_its_place_and_comes_back(images, path):
    clip, words = Clip().eval(), torch.arange(5)
    trunk, plain, names = clip.visual.trunk, clip(images, words), list(clip.state_dict())
    assert tdm.attach(clip, strategy(), path=path) is clip
    assert clip.visual.trunk.vit is trunk
    assert clip.visual.trunk.trace(images)[1].token_counts == [16, 8, 4, 4]
    assert not torch.equal(clip(images, words), plain)
    assert tdm.detach(clip, path=path) is clip
    assert clip.visual.trunk is trunk
    assert list(clip.state_dict()) == names
    assert torch.equal(clip(images, words), plain)


def test_gradients_reach_the_whole_model(images):
    clip = tdm.attach(Clip(), strategy())
    clip(images, torch.arange(5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.parameters())


@pytest.mark.parametrize(
    "container", [nn.Sequential, lambda *inner: nn.Sequential(nn.ModuleList(inner))]
)
def test_containers(container):
    vit = VisionTransformer(**SMALL)
    whole = tdm.attach(container(nn.Identity(), vit), strategy())
    assert sum(isinstance(inner, tdm.TokenReducedViT) for inner in whole.modules()) == 1
    tdm.detach(whole)
    assert not any(isinstance(inner, tdm.TokenReducedViT) for inner in whole.modules())
    assert any(inner is vit for inner in whole.modules())


def test_a_vit_that_hangs_there_twice_is_replaced_twice():
    clip = Clip()
    clip.backbone, clip.visual.again = clip.visual.trunk, clip.visual.trunk
    vit = clip.backbone
    tdm.attach(clip, strategy())
    assert clip.backbone is clip.visual.trunk is clip.visual.again
    assert clip.backbone.vit is vit
    tdm.detach(clip)
    assert clip.backbone is clip.visual.trunk is clip.visual.again is vit


def test_several_are_an_error_that_names_them():
    student, teacher = Clip(), Clip()
    pair = nn.ModuleDict({"student": student, "teacher": teacher})
    with pytest.raises(
        ValueError,
        match=r"2 ViTs.*'student\.visual\.trunk'.*'teacher\.visual\.trunk'.*say which by its path",
    ):
        tdm.attach(pair, strategy())
    tdm.attach(pair, strategy(), path="student")
    assert isinstance(student.visual.trunk, tdm.TokenReducedViT)
    assert isinstance(teacher.visual.trunk, VisionTransformer)
    tdm.attach(pair, strategy(), path="teacher.visual.trunk")
    with pytest.raises(
        ValueError,
        match=r"2 reduced models.*'student\.visual\.trunk', 'teacher\.visual\.trunk'.*by its path",
    ):
        tdm.detach(pair)
    tdm.detach(pair, "teacher")
    tdm.detach(pair)
    assert not any(isinstance(inner, tdm.TokenReducedViT) for inner in pair.modules())


def test_what_cannot_be_attached_or_detached():
    clip = Clip()
    with pytest.raises(ValueError, match=r"no submodule 'visual\.body'"):
        tdm.attach(clip, strategy(), "visual.body")
    with pytest.raises(ValueError, match=r"no ViT in Clip\.text"):
        tdm.attach(clip, strategy(), "text")
    with pytest.raises(
        TypeError,
        match="cannot reduce the tokens of Tower: it has no sequence of transformer blocks",
    ):
        tdm.attach(Tower(nn.Flatten()), strategy())
    with pytest.raises(TypeError, match="got a Clip in which nothing is attached"):
        tdm.detach(clip)
    with pytest.raises(TypeError, match="takes what attach"):
        tdm.detach(None)
    tdm.attach(clip, strategy())
    with pytest.raises(ValueError, match="reduced already, by TDM"):
        tdm.attach(clip, tdm.EViT())
    with pytest.raises(ValueError, match=r"no submodule 'visual\.body'"):
        tdm.detach(clip, "visual.body")
    with pytest.raises(TypeError, match=r"got a Clip\.text in which nothing is attached"):
        tdm.detach(clip, "text")


def test_nothing_is_replaced_where_the_strategy_does_not_fit():
    clip = Clip()
    trunk = clip.visual.trunk
    with pytest.raises(ValueError, match="layers"):
        tdm.attach(clip, tdm.TDM(0.5, (1, 9)))
    assert clip.visual.trunk is trunk


def backbone(**kwargs):
    """A timm ViT as detectors take it, cut off behind its last map."""
    shape = {name: value for name, value in SMALL.items() if name != "num_classes"}
    return timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=[2],
        **{**shape, "img_size": 64, **kwargs},
    )


@torch.no_grad()
def test_a_feature_backbone_of_timms():
    net, images = backbone().eval(), torch.randn(2, 3, 64, 64)
    plain = net(images)
    tdm.attach(net, tdm.TDM(1.0, (1, 2)))
    torch.testing.assert_close(net(images), plain)
    tdm.detach(net)
    (dense,) = tdm.attach(net, strategy())(images)
    assert dense.shape == plain[0].shape == (2, 32, 8, 8)
    assert dense.flatten(2)[0].T.unique(dim=0).shape[0] == 16  # of 64 patches


class Maps(nn.Module):
    """The backbone as torchvision's detectors want it."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.body = backbone()

    def forward(self, images):
        return self.body(images)[0]


def test_the_backbone_of_a_detector():
    anchors = AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
    regions = MultiScaleRoIAlign(featmap_names=["0"], output_size=2, sampling_ratio=1)
    size = {
        "min_size": 64,
        "max_size": 64,
        "rpn_pre_nms_top_n_train": 20,
        "rpn_post_nms_top_n_train": 10,
    }
    detector = FasterRCNN(Maps(), 3, rpn_anchor_generator=anchors, box_roi_pool=regions, **size)
    tdm.attach(detector, strategy())
    assert isinstance(detector.backbone.body.model, tdm.TokenReducedViT)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = detector.train()([torch.rand(3, 64, 64) for _ in targets], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    first = detector.backbone.body.model.vit.blocks[0].attn.qkv.weight
    assert first.grad.abs().sum() > 0
    with torch.no_grad():
        found, _ = detector.eval()([torch.rand(3, 64, 64) for _ in targets])
    assert set(found) == {"boxes", "labels", "scores"}
    assert isinstance(tdm.detach(detector).backbone.body.model, VisionTransformer)
