"""Small SViTEs, the two kinds of masks, and a training loop for them."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.sparsity import Structured, Unstructured

DEPTH = 4


def small(strategy, **changes):
    torch.manual_seed(0)
    settings = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": DEPTH,
        "num_heads": 3,
        "num_classes": 5,
    }
    return tdm.attach(VisionTransformer(**{**settings, **changes}), strategy)


def train(model, steps, total=None, hook=lambda step: None, lr=1e-2):
    """A training loop of the user's own."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        model.objective.on_progress(0, step, total or steps)
        loss = F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.objective.after_optimizer_step(model, step + 1, total or steps)
        hook(step + 1)
    return model.eval()


def masks(model):
    return {
        name: mask.clone()
        for name, mask in model.strategy.masks.named_buffers()
        if name != "in_force"
    }


def perturbed(model):
    """Biases as training leaves them: not zero."""
    with torch.no_grad():
        for block in model.vit.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.bias.normal_()
    return model


KINDS = [Structured(0.7, 0.6), Unstructured(0.4)]


def fresh(kind):
    return type(kind).from_config(kind.config())
