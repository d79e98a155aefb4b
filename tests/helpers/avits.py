"""Small A-ViTs whose tokens halt at different blocks."""

import copy

import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm

#: With these weights and this gate tokens halt after every block, class tokens too.
GATE = {"gate_scale": 1.5, "gate_center": 2.0}


def spread(vit):
    """Weights that make states differ between tokens, while channel 0 rises: so they halt at
    different blocks.
    """
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.05 if name.startswith("patch") else 0.25)
            elif name.endswith(("pos_embed", "norm1.bias", "norm2.bias")):
                parameter.normal_(std=0.5)
            elif "gamma" in name:
                parameter.fill_(0.7)
            elif name.startswith("head") and name.endswith("weight"):
                parameter.normal_(std=0.1)
        for block in vit.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0] *= 0.6
                layer.bias[0] = 0.4
    return vit.eval()


def make_vit(**kwargs):
    """16 patches, 6 blocks."""
    torch.manual_seed(1)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
        **kwargs,
    }
    return spread(VisionTransformer(**arguments))


def small(vit=None, **kwargs):
    return tdm.attach(make_vit() if vit is None else vit, tdm.AViT(**{**GATE, **kwargs})).eval()


def masking(model):
    """The same model in the form of training: halted tokens stay and are masked."""
    other = tdm.attach(model.vit, copy.deepcopy(model.strategy))
    other.strategy.train()
    return other


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
