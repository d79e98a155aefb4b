"""torchvision's VisionTransformer, reduced: a new class of models is one adapter, registered.

python examples/torchvision_vit.py fit --config quickstart --model.model torchvision_vit_tiny \
    --model.model_kwargs '{"img_size": 8, "patch_size": 2}' --model.strategy.layers '[1, 3]'

The last lines give the model a name in timm's registry, so that the command line knows it.
"""

from __future__ import annotations

import torch
from timm.models import generate_default_cfgs, register_model
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.errors import SettingError, UnsupportedModelError
from tdm_lightning.vit.adapters.attention import Heads, attended, seen_by


class TorchvisionAdapter(tdm.Adapter):
    """What differs in torchvision's ViT: names, one fixed image size, nn.MultiheadAttention."""

    def info(self, vit):
        side = vit.image_size // vit.patch_size
        return tdm.ModelInfo(
            depth=len(vit.encoder.layers),
            patches=side * side,
            width=vit.hidden_dim,
            heads=vit.encoder.layers[0].num_heads,
            prefix=1,
            class_tokens=1,
            pooling="token",
            num_classes=vit.num_classes,
            device=vit.class_token.device,
        )

    def input_size(self, vit):
        first = next(m for m in vit.conv_proj.modules() if isinstance(m, torch.nn.Conv2d))
        return first.in_channels, vit.image_size, vit.image_size

    def grid(self, vit, size):
        return size[0] // vit.patch_size, size[1] // vit.patch_size

    def blocks(self, vit):
        return vit.encoder.layers

    def check(self, vit, requirements):
        if requirements.rows:
            raise UnsupportedModelError("its blocks compute all rows")

    def embed(self, vit, images, info):
        expected = self.input_size(vit)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise SettingError(f"images must be B×{expected}, got {tuple(images.shape)}")
        x = vit._process_input(images)
        x = torch.cat((vit.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        return tdm.Tokens(vit.encoder.dropout(x + vit.encoder.pos_embedding), 1, info)

    def attend(self, block, index, tokens, needs, rows=None):
        if tokens.policy is not None:
            raise UnsupportedModelError("training with a policy is written for timm's Attention")
        attn, h = block.self_attention, block.ln_1(tokens.x)
        qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = Heads(q, k, v, attn.head_dim**-0.5, k)
        mixed = attended(heads, tokens.key_bias, attn.dropout if attn.training else 0.0)
        x = tokens.x + block.dropout(attn.out_proj(mixed))

        def read():
            normed = block.ln_2(x) if "normed" in needs else None
            return seen_by([heads], tokens, x, needs, tokens.key_bias, normed)

        return x, read

    def feed_forward(self, block, x):
        return x + block.mlp(block.ln_2(x))

    def norm(self, vit, x):
        return vit.encoder.ln(x)

    def head(self, vit, features, size=None, pre_logits=False):
        first = features[:, 0]
        return vit.heads[:-1](first) if pre_logits else vit.heads(first)


tdm.register_adapter(VisionTransformer, TorchvisionAdapter)

default_cfgs = generate_default_cfgs({"torchvision_vit_tiny.none": {"input_size": (3, 224, 224)}})


@register_model
def torchvision_vit_tiny(img_size=224, patch_size=16, num_classes=1000, **_of_timm):
    """Six blocks of width 64, without the stochastic depth and pretrained weights of timm's."""
    vit = VisionTransformer(img_size, patch_size, 6, 4, 64, 128, num_classes=num_classes)
    torch.nn.init.trunc_normal_(vit.heads.head.weight, std=0.02)
    vit.pretrained_cfg = {"architecture": "torchvision_vit_tiny", "num_classes": num_classes}
    return vit


if __name__ == "__main__":
    from tdm_lightning.cli import main

    main()
