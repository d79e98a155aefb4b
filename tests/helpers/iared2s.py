"""Small IA-RED² models whose interpreters tell patches apart."""

import torch
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tests.helpers.vits import lively

LABELS = torch.tensor([0, 1, 2, 3])


def small(strategy=None, std=0.3, **kwargs):
    """16 patches, 6 blocks in 3 groups; interpreters that tell patches apart around the
    threshold.
    """
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
    vit = lively(VisionTransformer(**arguments))
    model = tdm.attach(vit, tdm.IARED2() if strategy is None else strategy)
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            parameter.normal_(std=std)
        for interpreter in model.strategy.interpreters:  # so that few patches go at a time
            interpreter.qk.bias.fill_(0.4)
    return model
