"""Models by the name of their library."""

import sys

import pytest
import torch

from tdm_lightning.errors import SettingError
from tdm_lightning.vit.create import create_vit


def test_libraries():
    with torch.device("meta"):
        assert create_vit("test_vit").embed_dim == 64
        found = create_vit("torchvision:vit_b_32", num_classes=3)
        assert type(found).__module__ == "torchvision.models.vision_transformer"
        assert found.heads.head.out_features == 3
    tower = create_vit("open_clip:ViT-S-32-alt")
    assert type(tower).__module__ == "open_clip.transformer"


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("jax:vit", {}, "no models are made of 'jax'"),
        ("torchvision:vit_q", {}, "'torchvision:vit_q' with {}: Unknown model"),
        ("torchvision:vit_b_16", {"img_size": 64}, "'torchvision:vit_b_16'.*'img_size'"),
        ("open_clip:ViT-Q", {}, "'open_clip:ViT-Q'.*not found"),
        ("open_clip:ViT-B-32", {"pretrained": True}, "say which, such as 'open_clip:ViT-B-32/"),
    ],
)
def test_what_cannot_be_made_is_named(name, arguments, match):
    with pytest.raises(SettingError, match=match), torch.device("meta"):
        create_vit(name, arguments.pop("pretrained", False), **arguments)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SettingError, match=r"pip install 'tdm-lightning\[open_clip\]'"):
        create_vit("open_clip:ViT-B-32")
