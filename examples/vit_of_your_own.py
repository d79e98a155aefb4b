"""A ViT of your own, reduced: a new class of models is one adapter, registered.

python examples/vit_of_your_own.py fit --config quickstart --model.model encoder_vit_tiny \
    --model.model_kwargs '{"img_size": 8, "patch_size": 2}' --model.strategy.layers '[1, 3]'

The last lines give the model a name in timm's registry, so that the command line knows it.
"""

from __future__ import annotations

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.errors import SettingError, UnsupportedModelError
from tdm_lightning.vit.adapters.attention import Heads, attended, seen_by


class EncoderViT(nn.Module):
    """A ViT of torch's own encoder layers."""

    def __init__(self, img_size=224, patch_size=16, depth=6, width=64, heads=4, num_classes=1000):
        super().__init__()
        self.img_size, self.num_classes = img_size, num_classes
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        count = 1 + (img_size // patch_size) ** 2
        self.positions = nn.Parameter(torch.randn(1, count, width) * 0.02)
        shape = {"dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu"}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, **shape, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def embed(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions

    def forward(self, images):
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class EncoderAdapter(tdm.Adapter):
    """What differs in it: names, one fixed image size, nn.MultiheadAttention."""

    def info(self, vit):
        return tdm.ModelInfo(
            depth=len(vit.layers),
            patches=vit.positions.shape[1] - 1,
            width=vit.positions.shape[2],
            heads=vit.layers[0].self_attn.num_heads,
            prefix=1,
            class_tokens=1,
            pooling="token",
            num_classes=vit.num_classes,
            device=vit.positions.device,
        )

    def input_size(self, vit):
        return 3, vit.img_size, vit.img_size

    def grid(self, vit, size):
        rows, columns = vit.patches.kernel_size
        return size[0] // rows, size[1] // columns

    def blocks(self, vit):
        return vit.layers

    def check(self, vit, requirements):
        if requirements.rows:
            raise UnsupportedModelError("its blocks compute all rows")

    def embed(self, vit, images, info):
        expected = self.input_size(vit)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise SettingError(f"images must be B×{expected}, got {tuple(images.shape)}")
        return self.entering(vit, vit.embed(images), info)

    def attend(self, block, index, tokens, needs, rows=None):
        if tokens.policy is not None:
            raise UnsupportedModelError("training with a policy is written for timm's Attention")
        attn, h = block.self_attn, block.norm1(tokens.x)
        qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = Heads(q, k, v, attn.head_dim**-0.5, k)
        mixed = attended(heads, tokens.key_bias, attn.dropout if attn.training else 0.0)
        x = tokens.x + block.dropout1(attn.out_proj(mixed))

        def read():
            normed = block.norm2(x) if "normed" in needs else None
            return seen_by([heads], tokens, x, needs, tokens.key_bias, normed)

        return x, read

    def feed_forward(self, block, x):
        hidden = block.dropout(block.activation(block.linear1(block.norm2(x))))
        return x + block.dropout2(block.linear2(hidden))

    def norm(self, vit, x):
        return vit.norm(x)

    def head(self, vit, features, size=None, pre_logits=False):
        return features[:, 0] if pre_logits else vit.head(features[:, 0])


tdm.register_adapter(EncoderViT, EncoderAdapter)

default_cfgs = generate_default_cfgs({"encoder_vit_tiny.none": {"input_size": (3, 224, 224)}})


@register_model
def encoder_vit_tiny(img_size=224, patch_size=16, num_classes=1000, **_of_timm):
    """Six blocks of width 64, without the stochastic depth and pretrained weights of timm's."""
    vit = EncoderViT(img_size, patch_size, num_classes=num_classes)
    vit.pretrained_cfg = {"architecture": "encoder_vit_tiny", "num_classes": num_classes}
    return vit


if __name__ == "__main__":
    from tdm_lightning.cli import main

    main()
